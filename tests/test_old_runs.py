"""Run folders from before recipe keys and state were renamed still open, resume and export (tests/old_runs).

They were made by version 0.1.0.dev0 before the renaming, on torch, on the embedded model: ``lora`` and
``ppo`` were cut off after step 2 of 4, ``pipeline`` in its second stage, ``finished`` was not.
``*.whole.jsonl`` are the metrics of the same runs without a break.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_posttrain import engines, runs
from mlx_posttrain.cli import app

OLD = Path(__file__).with_name("old_runs")
pytestmark = pytest.mark.skipif(
    "torch" not in engines.available(), reason="the folders are of the torch engine"
)


def command(*arguments: object, text: str = "") -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def old(tmp_path):
    """A copy of an old folder, with the rows that the embedded tasks had then as files."""

    def copy(name: str) -> Path:
        folder = Path(shutil.copytree(OLD / name, tmp_path / name))
        for path in folder.rglob("recipe.yaml"):
            text = path.read_text().replace("source: embedded/tasks", f"source: {OLD / 'rows'}")
            text = text.replace("eval_split: null", "eval_split: valid")
            path.write_text(re.sub(r"families:\n( +- \w+\n)+", "families: null\n", text))
        return folder

    return copy


@pytest.mark.parametrize(
    ("name", "stage", "keys"),
    [
        ("lora", "", ["train.max_grad_norm", "train.grad_accumulation"]),
        ("ppo", "", ["train.max_grad_norm", "ppo.clip_range", "ppo.clip_range_value"]),
        ("pipeline", "second", ["train.max_grad_norm"]),
    ],
)
def test_resumes_to_the_figures_of_an_unbroken_run(name, stage, keys, old):
    folder = old(name)
    command("run", "--resume", folder)
    recipe = runs.reopen(folder / stage)[1]
    for key in keys:
        section, last = key.split(".")
        assert last in recipe[section]
    records = runs.Run(folder / stage).metrics()
    whole = [json.loads(line) for line in (OLD / f"{name}.whole.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [r["step"] for r in whole] and len(whole) >= 4
    for now, before in zip(records, whole, strict=True):
        shared = [k for k in before if k in now and not k.startswith(("seconds", "peak"))]
        assert {"loss", "eval/loss", "loss/policy_avg", "eval/score"} & set(shared)
        for key in shared:
            assert now[key] == pytest.approx(before[key], rel=2e-3, abs=2e-3), (key, now["step"])
    assert (folder / stage / "final").is_dir()


def test_chats_generates_and_exports(old, tmp_path):
    folder = old("finished")
    assert command("generate", folder, "--prompt", "What is 2 + 2?", "--max-tokens", "4").startswith("> What")
    assert command("chat", folder, "--max-tokens", "4", text="Hello\n\n").strip()
    command("export", folder, "--to", "peft", "--output", tmp_path / "peft")
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "train.max_grad_norm" in card and (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_an_old_key_in_a_recipe_is_an_error_that_names_the_new_one(tmp_path):
    done = CliRunner().invoke(app, ["run", "demo_lora", "train.accumulate=2", f"output={tmp_path / 'x'}"])
    assert "did you mean 'train.grad_accumulation'?" in str(done.exception)
    done = CliRunner().invoke(app, ["run", "demo_ppo", "ppo.clip=0.1", f"output={tmp_path / 'x'}"])
    assert "did you mean 'ppo.clip_range'?" in str(done.exception)
