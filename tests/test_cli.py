"""What a person gets at the terminal: one helpful line and exit code 2, and nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines
from tests.helpers import cli, write_jsonl

ENGINES = engines.available()


@pytest.fixture
def run(random_gpt2, rows_file, tmp_path, capfd, monkeypatch):
    """Run a recipe on the random model in this process; returns exit code and what was printed."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str, recipe: str = "01_sft", engine: str = ENGINES[0]):
        base = [
            f"model={random_gpt2}",
            f"data.source={rows_file}",
            "output=out",
            f"engine={engine}",
            "train.steps=2",
            "sample.count=0",
        ]
        code = cli("run", recipe, *base, *overrides)
        captured = capfd.readouterr()
        return SimpleNamespace(
            code=code,
            err=captured.err,
            out=captured.out,
            last=(captured.err.strip().splitlines() or [""])[-1],
        )

    return call


def refused(result, *words: str) -> None:
    assert result.code == 2
    assert result.last.startswith("mlx-posttrain: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.last, result.last


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.lr=1", ["'trian'", "'train'"]),
        ("train.learning_rat=1", ["'train.learning_rat'"]),
        ("data.tempate=plain", ["'data.tempate'", "'data.template'"]),
        ("lr=1e-4", ["'lr'", "'train.lr'"]),
        ("train.lr=fast", ["'train.lr': must be a number, not 'fast'"]),
        ("train.lr=-1", ["'train.lr': must be greater than 0, not -1"]),
        ("train.batch_size=2.5", ["'train.batch_size': must be a whole number, not 2.5"]),
        ("data.shuffle=perhaps", ["'data.shuffle': must be true or false, not 'perhaps'"]),
        ("train.schedule=step", ["'train.schedule': must be 'cosine', 'linear' or 'constant', not 'step'"]),
        ("method=sftt", ["'sftt'", "'sft'"]),
        ("engine=jax", ["'engine'", "mlx"]),
        ("adapter.quantize=5", ["quantize"]),
        ("data.template=instuction", ["instuction", "instruction"]),
        ("data.format=alpca", ["alpca", "alpaca"]),
        ("train.lr", ["key=value"]),
        ("model=no/such-model-xyz", ["no/such-model-xyz", "hf download"]),
        ("model=./nowhere", ["nowhere"]),
        ("data.source=nowhere.jsonl", ["nowhere.jsonl"]),
        ("data.source=someone/some-data", ["someone/some-data"]),
        ("adapter.targets=[q_proj]", ["q_proj", "c_attn"]),
    ],
)
def test_bad_settings(run, override, words, tmp_path):
    refused(run(override), *words)
    assert not (tmp_path / "out").exists()  # nothing was left to stumble over


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["bad.jsonl: the file has no rows"]),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a", output: "b"}\n', ["2"]),
        ('{"x": 1, "y": 2}\n', ["x, y", "alpaca"]),
        ('{"instruction": "a", "output": ""}\n', ["no"]),
        ('{"instruction": 3, "output": {"a": 1}}\n', ["1"]),
    ],
    ids=["empty file", "broken JSON", "unknown columns", "no trained token", "wrong type"],
)
def test_bad_files(run, tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    refused(run(f"data.source={path}"), "bad.jsonl" if "no" not in words else "", *words)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_trained_token_are_dropped_and_counted(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Say a word.", "output": f"word {i}"} for i in range(12)]
    rows.append({"instruction": "very long " * 80, "output": "cut away"})
    write_jsonl(path, rows)
    result = run(f"data.source={path}", "data.holdout=0", "data.max_length=48")
    assert result.code == 0
    assert "12 of 13 rows kept (1 without a trained token" in result.err


@pytest.mark.parametrize("engine", ENGINES)
def test_a_non_finite_loss_names_the_batch_and_keeps_the_weights(run, engine, monkeypatch, tmp_path):
    from mlx_posttrain.methods import sft

    real = sft.loss

    def nan_at_the_end(model, batch):
        value, metrics = real(model, batch)
        return value * (float("nan") if calls.pop() else 1.0), metrics

    monkeypatch.setattr("mlx_posttrain.methods.sft.loss", nan_at_the_end)
    monkeypatch.setattr("mlx_posttrain.engines.mlx.trainer._compile", lambda f, **_: f, raising=False)
    calls = [True, False, False]  # step 1, its weights before they are saved, step 2
    refused(run("data.holdout=0", engine=engine), "step 2", "rows [", "step-000001", "train.lr")
    assert (tmp_path / "out" / "checkpoints" / "step-000001" / "weights" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "final").exists()


def test_a_full_disk_is_found_before_training(run, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000))
    refused(run(), "not enough disk", "free")


def test_generate_prints_answers_and_refuses_long_prompts(random_gpt2, capfd):
    prompts = ["--prompt", "The cat", "--prompt", "A dog"]
    assert cli("generate", str(random_gpt2), *prompts, "--max-tokens", "5", "--json") == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [a["prompt"] for a in answers] == ["The cat", "A dog"] and all(a["tokens"] <= 5 for a in answers)
    sampled = ["generate", str(random_gpt2), "--prompt", "a", "--max-tokens", "1", "--samples", "2"]
    for temperature, hint in (("0", True), ("1", False)):
        assert cli(*sampled, "--temperature", temperature) == 0
        assert ("2 answers to a prompt are equal at temperature 0" in capfd.readouterr().err) is hint
    assert cli("generate", str(random_gpt2), "--prompt", "word " * 200) == 2
    assert "tokens" in capfd.readouterr().err


def test_help_and_recipe_errors_answer_at_once():
    """Neither help nor a refused recipe imports what takes a second to import, nor anything slow beside it.

    Modules are counted and not seconds, which on a shared machine vary by half within a minute.
    """
    heavy = {"torch", "mlx", "mlx_lm", "transformers", "datasets", "huggingface_hub", "pandas", "pyarrow"}

    def imported(*arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
        asked = [sys.executable, "-X", "importtime", "-m", "mlx_posttrain", *arguments]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        return done, {line.split("|")[-1].strip() for line in lines}

    helped, loaded = imported("--help")
    packages = {name.split(".")[0] for name in loaded}
    assert helped.returncode == 0 and "typer" in packages and not packages & {*heavy, "pydantic", "numpy"}
    assert len(loaded) < 250

    refused, loaded = imported("run", "01_sft", "trian.lr=1")
    packages = {name.split(".")[0] for name in loaded}
    assert refused.returncode == 2 and "trian" in refused.stderr.splitlines()[-1]
    assert "pydantic" in packages and not packages & heavy
    assert len(loaded) < 600


def test_a_file_is_named_as_it_is_typed(run, tmp_path):
    rows = [{"instruction": f"q{n}", "output": "a" if n else ""} for n in range(12)]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    for source in ("mine.jsonl", str(tmp_path / "mine.jsonl")):
        result = run(f"data.source={source}", "data.limit=11", "data.holdout=0", f"output=out{len(source)}")
        assert result.code == 0
        assert "mine.jsonl: 11 of 12 rows (data.limit)\n" in result.err
        assert "mine.jsonl train: 1 rows dropped: an empty answer\n" in result.err
        assert (
            f"{tmp_path}/mine.jsonl:" not in result.err and f"{tmp_path}/mine.jsonl train" not in result.err
        )
    (tmp_path / "mine.jsonl").write_text("{")
    result = run("data.source=mine.jsonl", "output=broken")
    assert result.last.startswith("mlx-posttrain: mine.jsonl, line 1: broken JSON")


def test_no_summary_of_a_command_is_cut_off(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli("--help") == 0
    commands = capfd.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(commands) >= 20
    assert not [line for line in commands if not line.endswith(".") or line.endswith("...")]


def test_keys_with_a_word(capfd):
    assert cli("keys", "max_grad_norm") == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("train.max_grad_norm (every method that trains): largest global gradient norm")
    assert cli("keys", "LR") == 0
    found = capfd.readouterr().out
    assert "\ntrain.lr (every method that trains): peak learning rate\n" in f"\n{found}"
    assert cli("keys", "cliprange_value_of_nothing") == 2
    assert "unknown method 'cliprange_value_of_nothing'" in capfd.readouterr().err


def test_every_key_is_described(capfd):
    assert cli("keys", "sft") == 0
    lines = capfd.readouterr().out.splitlines()
    keys = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    assert "train.lr: 2.0e-05" in lines
    assert all(lines[i + 1].startswith("    ") and lines[i + 1].strip() for i in keys)


def test_plain_progress_is_lines_not_control_codes(run):
    result = run("data.holdout=0")
    assert "\x1b" not in result.err and "trained tokens/s" in result.err and "GB" in result.err
    assert np.isfinite(float(result.err.split("loss ")[1].split()[0]))
