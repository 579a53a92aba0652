"""Answers to held-out rows during training, where some rows ask nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_posttrain import engines
from mlx_posttrain.errors import UserError
from tests.helpers import read_jsonl, run_recipe, write_jsonl

ENGINES = engines.available()


def run(model: Path, rows: list[dict[str, Any]], folder: Path, *overrides: str) -> Path:
    """A run of two steps on these rows, the last half held out by seed; returns its folder."""
    source = write_jsonl(folder / "rows.jsonl", rows)
    target = folder / "run"
    run_recipe(
        "01_sft",
        f"model={model}",
        f"data.source={source}",
        f"output={target}",
        "data.holdout=6",
        "data.max_length=48",
        "train.steps=2",
        "train.batch_size=4",
        "sample.max_tokens=4",
        *overrides,
    )
    return target


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_text_rows_train_and_are_not_asked(engine, random_gpt2, tmp_path, capfd):
    rows = [{"text": f"The cat {i} sat on the mat. <|endoftext|> A dog ran."} for i in range(12)]
    done = run(random_gpt2, rows, tmp_path, f"engine={engine}")
    said = capfd.readouterr().err.splitlines()
    left_out = "samples: 6 of 6 held-out rows cannot be asked and are left out"
    assert f"{left_out}: a prompt must end with a user turn" in said
    written = "have special tokens in their text, such as '<|endoftext|>', which act as such"
    assert f"training rows: 6 {written}" in said and f"held-out rows: 6 {written}" in said
    assert (done / "final").is_dir() and not (done / "samples.jsonl").exists()


def test_of_mixed_rows_those_with_a_question_are_asked(random_gpt2, tmp_path, capfd):
    """Two answers in a row: the second one has no question before it."""
    dialogues = [
        [("human", f"Say {i}."), ("gpt", f"It is {i}."), *([("gpt", "More.")] if i % 2 else [])]
        for i in range(12)
    ]
    rows = [{"conversations": [{"from": f, "value": v} for f, v in turns]} for turns in dialogues]
    done = run(random_gpt2, rows, tmp_path, "sample.count=2")
    wanted = [row["wanted"] for row in read_jsonl(done / "samples.jsonl")]
    assert len(set(wanted)) == 2 and "More." not in wanted
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("samples:")]
    number = int(said.split()[1])
    assert 0 < number < 6 and said.split()[2:4] == ["of", "6"]


def test_prompts_of_the_recipe_are_asked_of_plain_text_too(random_gpt2, tmp_path, capfd):
    rows = [{"text": f"The cat {i} sat on the mat."} for i in range(12)]
    done = run(random_gpt2, rows, tmp_path, 'sample.prompts=["The cat", ""]')
    assert [r["prompt"] for r in read_jsonl(done / "samples.jsonl")][:2] == ["The cat", ""]
    assert "samples:" not in capfd.readouterr().err


def test_no_samples_no_line(random_gpt2, tmp_path, capfd):
    run(random_gpt2, [{"text": f"The cat {i} sat."} for i in range(12)], tmp_path, "sample.count=0")
    assert "samples:" not in capfd.readouterr().err


def test_a_prompt_that_cannot_be_asked_is_named():
    from mlx_posttrain.data.encode import encode_prompts
    from mlx_posttrain.data.types import Turn
    from mlx_posttrain.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(engines.__file__).parents[1] / "assets" / "tiny")
    asked = [(Turn("user", "a"),), (Turn("user", "a"), Turn("assistant", "b")), ()]
    with pytest.raises(UserError, match=r"prompt 2 \('b'\): a prompt must end with a user turn"):
        encode_prompts(asked, tokenizer)
