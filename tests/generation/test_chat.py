"""The chat loop as a process: streaming, several turns, /new, end of input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mlx_posttrain import load
from mlx_posttrain.engines import available
from mlx_posttrain.generation.chat import _Printer
from mlx_posttrain.generation.chat import chat as talk
from mlx_posttrain.generation.model import template_for


def chat(model, text: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "chat", str(model), "--max-tokens", "6", *options],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_chat_answers_each_line_and_ends_with_the_input(random_gpt2):
    done = chat(random_gpt2, "The cat\nA dog\n/new\nThe cat\n", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("\n")
    (alone,) = load(str(random_gpt2)).answers(["The cat"], max_tokens=6)
    assert done.stdout.count("\n") >= 3
    # after /new the same question gets the same answer
    assert answers[0].strip() == alone["answer"]
    assert done.stdout.rstrip("\n").endswith(alone["answer"])


def test_a_long_conversation_forgets_its_beginning_instead_of_failing(random_gpt2):
    done = chat(random_gpt2, "The cat sat on the mat.\n" * 8)
    assert done.returncode == 0, done.stderr


def test_the_printer_holds_back_half_a_character(random_gpt2, capsys):
    from mlx_posttrain.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(random_gpt2)
    printer = _Printer(tokenizer)
    pieces = []
    for token in tokenizer.encode("a né 猫", add_special_tokens=False):
        printer(0, token)
        pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == "a né 猫" and "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("engine", available())
def test_a_runs_own_template_is_used(engine, random_gpt2, rows_file, tmp_path):
    from mlx_posttrain import methods
    from mlx_posttrain.models.open import open_model

    chosen = methods.load_recipe(
        "01_sft",
        [
            f"model={random_gpt2}",
            f"data.source={rows_file}",
            f"output={tmp_path / 'run'}",
            f"engine={engine}",
            "train.steps=1",
            "data.template=question",
            "sample.count=0",
        ],
    )
    methods.run(chosen)
    model, tokenizer, source = open_model(tmp_path / "run", engine)
    assert template_for(source, tokenizer, None) == ("question", True)
    assert template_for(source, tokenizer, "none")[1] is False
    (answer,) = load(str(tmp_path / "run"), engine).answers(["What?"], max_tokens=5)
    ids = tokenizer.encode("Question: What?\n\nAnswer:", add_special_tokens=False)
    (direct,) = model.generate([ids], max_tokens=5, stop=tokenizer.eos_token_id)
    assert answer["answer"] == tokenizer.decode(direct.tokens).strip()


def test_json_output_is_one_object_a_line(random_gpt2):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlx_posttrain",
            "generate",
            str(random_gpt2),
            "--prompt",
            "The cat",
            "--samples",
            "3",
            "--temperature",
            "1",
            "--max-tokens",
            "4",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 3 and len({a["answer"] for a in answers}) > 1


def test_a_chat_explains_itself_and_takes_commands(monkeypatch, capsys):
    class Talker:
        name, tokenizer, heard = "talker", None, []

        def chat(self, messages, **options):
            self.heard.append([(m["role"], m["content"]) for m in messages])
            return "yes"

    lines = iter(
        ["/help", "hi", "/system Be kind.", "hi", "/reset", "hi", "/system", "hi", "/bye", "/etc/x is?", ""]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    talk(Talker(), temperature=0.0)
    kind = ("system", "Be kind.")
    assert Talker.heard == [
        [("user", "hi")],
        [kind, ("user", "hi")],
        [kind, ("user", "hi")],
        [("user", "hi")],
        [("user", "hi"), ("assistant", "yes"), ("user", "/etc/x is?")],
    ]
    told = capsys.readouterr().err
    assert told.startswith("talking to talker: ") and all(
        c in told for c in ("/system TEXT", "/reset", "no command /bye")
    )
