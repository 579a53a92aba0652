"""What other libraries answer from an export, with the code of its card, is what ``generate`` answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.models.export import export
from mlx_posttrain.models.usage import QUESTION
from tests.helpers import cli, mlx_lm_server, run_recipe

ENGINES = engines.available()
KINDS = {
    "question": ["adapter.rank=4", "adapter.alpha=16", "data.template=question"],
    "several": ["data.template=[plain, instruction]", "data.system=Be brief.", "train.lr=1e-4"],
    "chat": ["data.template=chat", "adapter.rank=4", "data.system=Be brief."],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The embedded model in float32, and one that has a chat template of its own."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("small", "talker"):
        convert("tiny", folder / name, to="hf", dtype="float32")
    tokens = folder / "talker" / "tokenizer_config.json"
    own = (
        "{% for m in messages %}[{{ m['role'] }}]{{ '\n' + m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{{ '\n' }}{% endif %}"
    )
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | {"chat_template": own}))
    return folder


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """Finished runs by kind, made once."""
    folder = tmp_path_factory.mktemp("runs")

    def get(kind: str) -> Path:
        if not (folder / kind).exists():
            base = bases / ("talker" if kind == "chat" else "small")
            common = [
                "data.source=embedded/tasks",
                "data.limit=64",
                "data.eval_limit=4",
                "data.max_length=96",
            ]
            steps = ["train.steps=6", "train.batch_size=8", "train.lr=1e-3", "sample.count=0"]
            run_recipe("01_sft", f"model={base}", f"output={folder / kind}", *common, *steps, *KINDS[kind])
        return folder / kind

    return get


def answer(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What ``mlx-posttrain generate`` answers."""
    capsys.readouterr()
    assert cli("generate", str(run), "--prompt", QUESTION, "--json") == 0
    return json.loads(capsys.readouterr().out)["answer"]


def snippets(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def run_snippet(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a snippet prints, run where the card lies."""
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().strip()


@pytest.mark.parametrize(
    ("kind", "to", "merged"),
    [
        ("question", "peft", False),
        ("question", "hf", True),
        ("several", "mlx-lm", False),
        ("chat", "mlx-lm", True),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (
                ("question", "mlx-lm", False),
                ("question", "mlx-lm", True),
                ("several", "hf", False),
                ("chat", "peft", False),
            )
        ),
    ],
)
def test_the_code_of_a_card_answers_as_we_do(kind, to, merged, runs, bases, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlx_lm" if to == "mlx-lm" else "peft")
    run, out = runs(kind), tmp_path / "out"
    wanted = answer(run, capsys)
    assert wanted
    export(run, out, to, merged=merged)
    (code,) = snippets(out)
    if to == "mlx-lm" and not merged and kind != "several":  # the card says to convert the base
        told = (out / "README.md").read_text()
        assert "`mlx-posttrain convert small small-mlx`" in told
        assert "where the command says `small`, write where it lies" in told
        convert(bases / "small", out / "small-mlx", to="mlx")
    assert run_snippet(code, out, monkeypatch) == wanted
    card = (out / "README.md").read_text()
    assert not re.search(r"(?:^|[\s='\"`\[(])/(?:\w|-)+/", card, re.M), "an absolute path"
    told = {
        "question": "the format `question`",
        "several": "trained in `instruction` too",
        "chat": "own chat",
    }
    assert told[kind] in card
    if to != "mlx-lm" or merged or kind == "several":  # we read what we export as we read the run
        assert answer(out, capsys) == wanted or kind == "chat"


def test_a_card_says_that_a_base_folder_must_be_named(tmp_path):
    pytest.importorskip("mlx_lm")
    from mlx_posttrain.models.merge import base_folder
    from tests.random_models import SMALL, random_model

    base = random_model(tmp_path / "mine", {**SMALL, "vocab_size": 4096}, tokenizer=base_folder("tiny"))
    rows = ["data.source=embedded/tasks", "data.limit=32", "data.eval_limit=4", "data.max_length=64"]
    steps = ["train.steps=1", "sample.count=0", "adapter.rank=2", f"output={tmp_path / 'run'}"]
    run_recipe("01_sft", f"model={base}", *rows, *steps)
    export(tmp_path / "run", tmp_path / "out", "mlx-lm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "where the code says `mine`, write where it lies" in card and 'load("mine", adapter_path' in card


def test_a_finished_run_carries_its_format_too(runs, capsys):
    from transformers import AutoTokenizer

    for kind in ("question", "several"):
        tokenizer = AutoTokenizer.from_pretrained(runs(kind) / "final")
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": " Hi "}], add_generation_prompt=True, tokenize=False
        )
        marks = {
            "question": "Question: Hi\n\nAnswer:",
            "several": "Be brief.\n\nInstruction: Hi\n\nResponse:",
        }
        assert asked == marks[kind]
    final = AutoTokenizer.from_pretrained(runs("chat") / "final")
    assert final.chat_template.startswith("{% for m in messages %}[")


@pytest.mark.exhaustive
@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_the_programs_of_mlx_lm_answer_as_we_do(runs, tmp_path, capsys):
    pytest.importorskip("mlx_lm")
    run, out = runs("question"), tmp_path / "out"
    wanted = answer(run, capsys)
    export(run, out, "mlx-lm", merged=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    asked = ["--model", str(out), "--prompt", QUESTION, "--max-tokens", "128", "--temp", "0"]
    told = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *asked], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.split("==========")[1].strip() == wanted
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 128, "temperature": 0.0}
    with mlx_lm_server(out) as url:
        request = urllib.request.Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            found = json.load(reply)
    assert found["choices"][0]["message"]["content"].strip() == wanted
