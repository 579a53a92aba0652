"""Prompts of rollouts: which rows can be asked, and what is said of the others."""

from __future__ import annotations

import pytest

from mlx_posttrain.config import DataSection
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.rl import prompts
from tests.helpers import write_jsonl


def test_rows_without_a_question_are_dropped_and_counted(random_gpt2, tmp_path, capfd):
    tokenizer = load_tokenizer(random_gpt2)
    dialogues = [
        [
            ("user", f"Say {i} <|endoftext|>."),
            ("assistant", "It is."),
            *([("assistant", "More.")] * (i % 3 == 0)),
        ]
        for i in range(9)
    ]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in dialogues]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = DataSection(source=str(source), template="question", holdout=0)
    train, held_out = prompts.read(data, tokenizer, 64, 8, seed=0)
    assert [q.text for q in train] == [f"Say {i} <|endoftext|>." for i in range(9) if i % 3] and not held_out
    assert [q.columns["reference_answer"] for q in train] == ["It is."] * 6
    said = capfd.readouterr().err
    assert (
        "prompts: 6 of 9 kept (0 longer than 56 tokens); 3 dropped: a prompt must end with a user turn"
        in said
    )
    assert "prompts: 9 have special tokens in their text, such as '<|endoftext|>'" in said


def test_plain_text_alone_cannot_be_asked(random_gpt2, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "The cat sat."}] * 3)
    with pytest.raises(UserError, match=r"rows.jsonl: no row has a question to answer .* a column 'prompt'"):
        prompts.read(DataSection(source=str(source), holdout=0), load_tokenizer(random_gpt2), 64, 8, seed=0)
