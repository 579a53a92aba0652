"""Labelled answers: what becomes of rows, which answers are mismatched, and the arrays of a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_posttrain.convert import hub
from mlx_posttrain.data.labelled import LabelledCollator, encode_labelled, exchange, mismatch
from mlx_posttrain.data.types import Example, Labelled, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(hub.resolve("tiny"))


def row(question, answer, label=True):
    return Labelled((Turn("user", question),), answer, label)


def encode(rows, tokenizer, **settings):
    return encode_labelled(
        rows, tokenizer, **{"template": "question", "max_length": 64, "seed": 0} | settings
    )


def test_prompt_of_one_and_answer_of_another():
    asked = Example((1, 2, 3, 8), (False, False, False, True))
    answered = Example((4, 5, 6, 9), (False, True, True, False))
    assert exchange(asked, answered) == Example((1, 2, 3, 5, 6, 9), (False,) * 3 + (True, True, False))


@pytest.mark.parametrize("sizes", [(1,) * 9, (2,) * 5, (30, 1), (1, 1)])
def test_mismatched_rows_ask_something_else_and_are_fixed_by_seed(sizes):
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    found = [mismatch(prompts, seed) for seed in range(40)]
    assert all((prompts[one] != prompts).all() for one in found)
    assert np.array_equal(found[3], mismatch(prompts, 3))
    if len(prompts) > 5 and len(sizes) > 2:
        assert len({tuple(one) for one in found}) > 30
        used = np.bincount(np.concatenate(found), minlength=len(prompts))
        assert used.min() > 20 and used.max() < 60  # 40 each on average


def test_items_keep_label_prompt_and_row(tiny):
    rows = [row("Two and two?", "4"), row("Two and two?", "5", False), row("A colour?", "Red")]
    items, report = encode(rows, tiny)
    assert [item.row for item in items] == rows and [item.good for item in items] == [True, False, True]
    assert [item.prompt for item in items] == [0, 0, 1] and report.kept == 3
    for item in items:
        start = item.answer.answer_start
        assert item.mismatched.tokens[:start] == item.answer.tokens[:start]
        assert item.mismatched.answer_start == start
    red = items[2].answer.tokens[items[2].answer.answer_start :]
    assert items[0].mismatched.tokens[items[0].answer.answer_start :] == red


def test_long_answers_are_dropped_and_mismatched_ones_cut(tiny):
    rows = [
        row("Say it.", "five " * 100),
        row("One?", "1"),
        row("Please write a word and then some other words.", "many words " * 4),
    ]
    shorter = max(len(item.answer.tokens) for item in encode(rows[1:], tiny)[0])
    items, report = encode(rows, tiny, max_length=shorter)
    assert [item.row for item in items] == rows[1:] and (report.long, report.cut) == (1, 0)
    assert all(len(item.mismatched.tokens) <= shorter for item in items)
    assert "2 of 3 labelled answers kept (1 too long" in str(report)
    both = [row("Please write a word and then some others.", "a"), row("Go.", "many words " * 6)]
    longest = max(len(item.answer.tokens) for item in encode(both, tiny)[0])
    items, report = encode(both, tiny, max_length=longest)
    assert report.cut == 1 and len(items[0].mismatched.tokens) == longest
    assert any(items[0].mismatched.trained)


def test_a_dialogue_loses_its_oldest_turns(tiny):
    talk = tuple(Turn(role, "hello " * 6) for _ in range(5) for role in ("user", "assistant"))
    long = Labelled((*talk, Turn("user", "Well?")), "Yes.", True)
    items, report = encode([long, row("One?", "1")], tiny, template="dialogue")
    assert report.shortened == 1 and len(items[0].answer.tokens) <= 64


def test_rows_that_cannot_be_used(tiny):
    with pytest.raises(UserError, match=r"row 2: the answer has no text"):
        encode([row("A?", "b"), row("C?", " ")], tiny)
    with pytest.raises(UserError, match=r"no answer left to train on: 0 of 1 .*raise data.max_length \(8\)"):
        encode([row("A?", "five " * 20)], tiny, max_length=8)
    with pytest.raises(UserError, match=r"all 2 answers are to one prompt"):
        encode([row("A?", "b"), row("A?", "c", False)], tiny)
    assert encode([row("A?", "b"), row("A?", "c", False)], tiny, needed=False)[0] == []


def test_a_batch_holds_both_kinds_in_one_shape(tiny):
    rows = [row("Two and two?", "4 and no more"), row("A colour?", "Red", False), row("Why?", "Because.")]
    items = [replace(item, weight=2.0 if item.good else 0.5) for item in encode(rows, tiny)[0]]
    known = {
        example: np.arange(sum(example.trained[1:]), dtype=np.float32) + 100 * side + 10 * number
        for number, item in enumerate(items)
        for side, example in enumerate((item.answer, item.mismatched))
    }
    batch = LabelledCollator(64)(items, {"ref_logprobs": known})
    assert batch.units == 3 and batch.count == 3
    assert batch.extra["label"].tolist() == [1, 0, 1] and batch.extra["row_weight"].tolist() == [2, 0.5, 2]
    for side, prefix in enumerate(("", "mismatched_")):
        get = batch.extra.get if prefix else lambda name: getattr(batch, name, batch.extra.get(name))
        tokens, index, target, rows_of, mask, ref = (
            get(prefix + name) for name in ("tokens", "index", "target", "row", "mask", "ref_logprobs")
        )
        assert tokens.shape == batch.tokens.shape and index.shape == batch.index.shape
        for number, item in enumerate(items):
            example = (item.answer, item.mismatched)[side]
            own = (rows_of == number) & (mask > 0)
            length = len(example.tokens)
            assert tuple(tokens[number, :length]) == example.tokens
            answer = [t for t, trained in zip(example.tokens, example.trained, strict=True) if trained]
            assert target[own].tolist() == answer
            assert tokens.flatten()[index[own] + 1].tolist() == answer
            assert ref[own].tolist() == known[example].tolist()
        assert not ref[mask == 0].any()
