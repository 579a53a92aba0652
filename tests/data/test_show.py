"""`data` and `validate`: rows as the model sees them, what is dropped and why, and what would stop a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_posttrain import methods
from mlx_posttrain.cli import app
from mlx_posttrain.data import show
from mlx_posttrain.data.types import Example
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests.helpers import refused, write_jsonl

ROWS = [
    {"question": "Who?", "answer": "The king."},
    {"question": "Empty?", "answer": " "},
    {"question": "Long? " + "so " * 60, "answer": "Yes."},
    {"question": "Where?", "answer": "In the hills 🌄 of Wales."},
]
KEYS = ["01_sft", "model=tiny", "data.holdout=0", "data.template=question", "data.max_length=40"]


@pytest.fixture
def source(tmp_path) -> str:
    return f"data.source={write_jsonl(tmp_path / 'rows.jsonl', ROWS)}"


def command(*arguments: str) -> list[str]:
    """The lines that a command prints on standard output."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def as_json(*arguments: str) -> list[dict]:
    return [json.loads(line) for line in command("data", *arguments, "--json")]


def test_rows_as_the_model_sees_them(source):
    *rows, totals = as_json(*KEYS, source, "data.too_long=drop")
    assert totals == {
        "rows": 4,
        "kept": 2,
        "dropped": {"an empty answer": 1, "too long": 1},
        "trained_tokens": totals["trained_tokens"],
    }
    tokenizer = load_tokenizer(methods_folder())
    trained = 0
    for row, asked in zip(rows, (ROWS[0], ROWS[3]), strict=True):
        assert list(row) == ["pieces", "ids"]
        (prompt, first), (answer, second) = row["pieces"]
        assert (first, second) == (False, True) and asked["question"] in prompt
        assert answer.strip() == asked["answer"] + "<|endoftext|>"
        assert tokenizer.decode(row["ids"]) == prompt + answer
        trained += len(tokenizer(answer)["input_ids"])
    assert totals["trained_tokens"] == trained


def methods_folder() -> Path:
    from mlx_posttrain.models.source import locate

    return locate("tiny").shape_folder


def test_as_text(source):
    lines = "\n".join(command("data", *KEYS, source, "data.too_long=drop", "--rows", "1"))
    assert "[[ The king.<|endoftext|>]]" in lines and "Wales" not in lines and "\x1b" not in lines
    assert "2 of 4 rows are trained on" in lines and "dropped: 1 (an empty answer), 1 (too long)" in lines
    shown = show.read(methods.load_recipe(KEYS[0], [*KEYS[1:], source]))
    coloured = "\n".join(show.to_text(shown, 1, colour=True))
    assert "\x1b[1;32m The king.<|endoftext|>\x1b[0m" in coloured


def test_a_run_that_ends_inside_a_character():
    tokenizer = load_tokenizer(methods_folder())
    ids = tokenizer("a🌄b")["input_ids"]
    half = len(ids) // 2
    row = Example(tuple(ids), tuple(i >= half for i in range(len(ids))))
    found = show.pieces(row, tokenizer)
    assert [trained for _, trained in found] == [False, True]
    assert found[0][0].startswith("a") and found[1][0].endswith("b")


def test_control_characters_are_written_out(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Who\x1b[2J?", "answer": "Me\x07."}])
    text = "\n".join(command("data", *KEYS, f"data.source={rows}"))
    assert "\x1b" not in text and "\\x1b[2J" in text and "\\x07" in text


def test_pairs_and_prompts():
    pairs = ["09_dpo", "model=tiny", "data.source=embedded/preferences", "data.eval_split=null"]
    *rows, totals = as_json(*pairs, "data.limit=12", "--rows", "3")
    assert len(rows) == 3 and totals["kept"] + sum(totals["dropped"].values()) == totals["rows"] == 12
    for row in rows:
        assert row["pieces"][0] == row["rejected"]["pieces"][0] and row["ids"] != row["rejected"]["ids"]
        assert row["pieces"][-1][1] and row["rejected"]["pieces"][-1][1]
    asked = ["07_ppo", "model=tiny", "reward=[{function: checker}]", "data.source=embedded/tasks"]
    asked += ["data.eval_split=valid", "data.template=question", "data.max_length=24", "data.limit=30"]
    *rows, totals = as_json(*asked)
    assert totals["trained_tokens"] == 0 and totals["dropped"]["too long"] == 30 - totals["kept"] > 0
    assert all([trained for _, trained in row["pieces"]] == [False] for row in rows)


def test_cleaning_is_counted(tmp_path):
    rows = [{"instruction": f"Say {n}.", "output": "Yes, it is so today."} for n in range(4)]
    rows.append({"instruction": "Say it.", "output": "No"})
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    *_, totals = as_json(
        "06_kl_sft", "model=tiny", f"data.source={source}", "data.holdout=0", "data.clean.min_words=3"
    )
    assert totals["rows"] == 5 and totals["kept"] + sum(totals["dropped"].values()) == 5
    assert any(re.match("cleaned: ", reason) for reason in totals["dropped"])


def test_validate(source, tmp_path, capfd):
    output = f"output={tmp_path / 'run'}"
    lines = command("validate", *KEYS, source, output)
    assert lines[-1].endswith("run: the run can start") and not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    assert "exists and is not empty" in refused(capfd, "validate", *KEYS, source, output)
    output = f"output={tmp_path / 'other'}"
    late = refused(capfd, "validate", *KEYS, source, output, "train.steps=3", "train.warmup=3")
    assert "train.warmup=3 steps, and the run has 3" in late
    ppo = ["07_ppo", "model=tiny", "data.source=embedded/tasks", "data.eval_split=valid", output]
    missing = refused(capfd, "validate", *ppo, "reward=[{function: nowhere.py:x}]")
    assert "there is no file" in missing
    assert command("validate", *ppo, "reward=[{function: checker}]")[-1].endswith("the run can start")
    stages = command("validate", "demo", f"output={tmp_path / 'demo'}")
    assert stages[0] == "pipeline: every key is known" and len(stages) == 10
    assert "reads no rows itself" in refused(capfd, "data", "demo")
