"""Pairs to batches: what a side's tokens are, where its score is read, which pairs stay together."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_posttrain.data import encode, pairs
from mlx_posttrain.data.types import Conversation, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.loading import load_tokenizer
from mlx_posttrain.recipe import TrainSection


@pytest.fixture(scope="module")
def tokenizer(random_gpt2: Path):
    return load_tokenizer(random_gpt2)


def preference(prompt: str, chosen: str, rejected: str, **extra) -> Preference:
    return Preference((Turn("user", prompt),), chosen, rejected, extra=extra)


def test_sides_are_what_sft_would_see(tokenizer):
    row = preference("Say a word.", "a moon", "the hill, the hill")
    (pair,), report = pairs.encode_pairs([row], tokenizer, template="question", max_length=64)
    for side, text in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
        conversation = Conversation((*row.prompt, Turn("assistant", text)))
        assert side == encode.encode(conversation, tokenizer, template="question", max_length=64).tokens
    assert side[-1] == encode.eos_id(tokenizer)
    assert (report.kept, report.total) == (1, 1)


def test_a_long_dialogue_loses_its_oldest_turns_and_a_long_answer_its_pair(tokenizer):
    long = Preference(
        (Turn("user", "cat " * 30), Turn("assistant", "dog " * 10), Turn("user", "And then?")), "a moon", "no moon at all"
    )  # fmt: skip
    short = Preference((Turn("user", "And then?"),), "a moon", "no moon at all")
    hopeless = preference("And then?", "moon " * 60, "hill")
    found, report = pairs.encode_pairs([long, short, hopeless], tokenizer, template="dialogue", max_length=48)
    assert [p.chosen for p in found] == [found[1].chosen] * 2
    assert (report.kept, report.long, report.shortened) == (2, 1, 1)
    assert found[0].row is long
    with pytest.raises(UserError, match=r"no pair left.*data\.max_length"):
        pairs.encode_pairs([hopeless], tokenizer, template="dialogue", max_length=48)


def test_prompts_are_numbered_and_margins_read(tokenizer):
    rows = [preference("one", "a", "b", margin=2), preference("two", "a", "b"), preference("one", "c", "a")]
    found, _ = pairs.encode_pairs(rows, tokenizer, template="question", max_length=64)
    assert [p.prompt for p in found] == [0, 1, 0]
    assert [p.margin for p in found] == [2.0, 0.0, 0.0]
    with pytest.raises(UserError, match=r"pair 1.*margin.*'big'"):
        pairs.encode_pairs([preference("one", "a", "b", margin="big")], tokenizer, template="question", max_length=64)


@pytest.mark.parametrize("pad", [0, 7])
def test_the_position_of_a_score_is_transformers_own(pad, random_gpt2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    net = AutoModelForSequenceClassification.from_pretrained(random_gpt2, num_labels=1, pad_token_id=pad).eval()
    rows = [[5, 6, 8, 0], [5, 7, 8, 9, 7], [5, 0, 6, 0, 0], [7, 9, 7, 7], [9], [pad, pad, pad]]
    longest = max(map(len, rows))
    tokens = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
    with torch.no_grad():
        theirs = net(input_ids=tokens).logits[:, 0]
        every = net.score(net.transformer(input_ids=tokens).last_hidden_state)[:, :, 0]
    ours = torch.stack([every[i, pairs.last_token(r, pad)] for i, r in enumerate(rows)])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert pairs.last_token([5, 0, 0], None) == 2


def test_a_row_in_several_pairs_is_read_once():
    a, b, c = (1, 2, 3, 0), (1, 2, 4, 0), (1, 2, 5, 6, 0)
    row = preference("p", "x", "y")
    batch = pairs.collate_pairs([pairs.Pair(a, b, 0, row), pairs.Pair(b, c, 0, row, 0.5), pairs.Pair(a, c, 0, row)], pad=0)
    assert batch.tokens.shape == (3, 32)
    assert batch.extra["chosen"].tolist() == [0, 1, 0]
    assert batch.extra["rejected"].tolist() == [1, 2, 2]
    assert batch.extra["margin"].tolist() == [0.0, 0.5, 0.0]
    assert (batch.index % 32).tolist() == [2, 2, 3]
    assert (batch.count, batch.trained_tokens) == (3.0, 3.0)
    assert pairs.collate_rows([a], 0, context=20).tokens.shape == (1, 20)
    with pytest.raises(ValueError, match="5 tokens"):
        pairs.collate_rows([c], 0, context=4)


def many(groups: list[int]) -> list[pairs.Pair]:
    row = preference("p", "x", "y")
    found = []
    for number, size in enumerate(groups):
        for k in range(size):
            length = 3 + (number * 7 + k) % 40
            found.append(pairs.Pair(tuple(range(1, length)), tuple(range(2, length + 2)), number, row))
    return found


@pytest.mark.parametrize("groups", [[1] * 37, [3, 1, 2] * 9, [6, 1, 1]])
def test_every_pair_once_and_prompts_whole(groups):
    train = many(groups)
    settings = TrainSection(batch_size=2, accumulate=2)
    data = pairs.PairData(train, [], settings, seed=3, context=64, pad=0)
    epochs = []
    for epoch in (0, 1):
        steps = [data.rows(epoch * data.steps_per_epoch + s) for s in range(data.steps_per_epoch)]
        assert sorted(i for step in steps for part in step for i in part) == list(range(len(train)))
        for part in (part for step in steps for part in step):
            for i in part:  # no pair of the prompt is elsewhere
                assert {j for j, p in enumerate(train) if p.prompt == train[i].prompt} <= set(part)
        epochs.append(steps)
    assert epochs[0] != epochs[1] or len(groups) < 4
    again = pairs.PairData(train, [], settings, seed=3, context=64, pad=0)
    assert again.rows(data.steps_per_epoch) == data.rows(data.steps_per_epoch)
    assert again.steps == again.steps_per_epoch
    if set(groups) == {1}:
        assert [len(p) for step in epochs[0][:-1] for p in step].count(2) >= 2 * (len(epochs[0]) - 2)


def test_a_token_budget_holds():
    data = pairs.PairData(many([1] * 20), many([1] * 9), TrainSection(batch_size=8, token_budget=256), seed=0, context=64, pad=0)
    for step in range(data.steps):
        assert all(b.tokens.size <= 256 for b in data.micro_batches(data.rows(step)))
    held_out = data.evaluation()
    assert sum(b.count for b in held_out) == 9
    assert all(b.tokens.size <= 256 for b in held_out)
