"""Pairs: token ids, the position of a score, batches checked by hand, and the order of an epoch.

Token ids are compared with encode, the position of a score with transformers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlx_posttrain.config import TrainSection
from mlx_posttrain.data import fitting, pairs
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.data.encode import encode
from mlx_posttrain.data.pairs import PairCollator, collate_scores, encode_pairs, last_token
from mlx_posttrain.data.types import Conversation, Example, Pair, Preference, Turn
from mlx_posttrain.errors import UserError

QUESTION = (Turn("user", "What is two and two?"),)


@pytest.fixture(scope="module")
def tiny(root) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "mlx_posttrain" / "assets" / "tiny")


def talk(exchanges: int, *, system: bool = False) -> tuple[Turn, ...]:
    """Return a dialogue of some exchanges that ends with a question."""
    turns = [Turn("system", "You are kind.")] if system else []
    for i in range(exchanges):
        turns += [Turn("user", f"Question number {i}?"), Turn("assistant", f"It is {i}.")]
    return (*turns, Turn("user", "And what comes now?"))


def side(
    tokenizer: Any,
    prompt: tuple[Turn, ...],
    answer: str,
    template: str = "instruction",
    templated: bool = True,
) -> Example:
    """Return prompt and answer as ids, with those of the answer marked."""
    example = encode(
        Conversation((*prompt, Turn("assistant", answer)), templated),
        tokenizer,
        template=template,
        max_length=10_000,
    )
    assert example is not None
    return example


def pair(number: int, prompt: int | None = None, length: int = 4, chosen: int = 1, rejected: int = 2) -> Pair:
    """Return a pair of rows of ``length`` tokens: the prompt as one, some 3s, the answer as one."""
    prompt = number if prompt is None else prompt
    marks = (False,) * (length - 1) + (True,)
    sides = [Example((prompt, *[3] * (length - 2), answer), marks) for answer in (chosen, rejected)]
    return Pair(sides[0], sides[1], prompt, Preference(QUESTION, str(chosen), str(rejected)))


# rows to pairs


@pytest.mark.parametrize(
    "template, templated", [("instruction", True), ("dialogue", True), ("none", True), ("instruction", False)]
)
def test_a_side_has_the_tokens_of_its_conversation(tiny, template, templated):
    rows = [
        Preference(p, "It is four.", "It is five, I think.", templated)
        for p in (QUESTION, talk(2), talk(1, system=True))
    ]
    found, report = encode_pairs(rows, tiny, template=template, max_length=512)
    for row, made in zip(rows, found, strict=True):
        assert made.row is row
        assert made.chosen == side(tiny, row.prompt, "It is four.", template, templated)
        assert made.rejected == side(tiny, row.prompt, "It is five, I think.", template, templated)
        assert made.chosen.tokens[-1] == made.rejected.tokens[-1] == tiny.eos_token_id
        for example, text in ((made.chosen, "It is four."), (made.rejected, "It is five, I think.")):
            answer = [t for t, trained in zip(example.tokens, example.trained, strict=True) if trained]
            assert tiny.decode(answer[:-1]).strip() == text and answer[-1] == tiny.eos_token_id
    assert (report.total, report.kept, report.long, report.same, report.shortened) == (3, 3, 0, 0, 0)


def test_pairs_of_one_prompt_share_its_number(tiny):
    other = (Turn("user", "What is three and three?"),)
    rows = [Preference(QUESTION, "4", "5"), Preference(other, "6", "7"), Preference(QUESTION, "four", "4")]
    assert [p.prompt for p in encode_pairs(rows, tiny, template="instruction", max_length=64)[0]] == [0, 1, 0]


def test_margin_is_the_column(tiny):
    extras = [{"margin": 1.5}, {"margin": 2}, {}]
    rows = [Preference(QUESTION, "4", "5", extra=extra) for extra in extras]
    assert [p.margin for p in encode_pairs(rows, tiny, template="instruction", max_length=64)[0]] == [
        1.5,
        2.0,
        0.0,
    ]


def test_a_margin_of_a_csv_file_is_text(tiny):
    rows = [Preference(QUESTION, "4", "5", extra={"margin": " 0.5"})]
    assert encode_pairs(rows, tiny, template="instruction", max_length=64)[0][0].margin == 0.5


@pytest.mark.parametrize("margin", ["much", "1_0", "inf", "", True, None, float("nan"), float("inf")])
def test_a_margin_that_is_no_number_names_its_pair(tiny, margin):
    rows = [Preference(QUESTION, "4", "5"), Preference(QUESTION, "4", "6", extra={"margin": margin})]
    with pytest.raises(UserError, match=r"pair 2: the column 'margin' must be a finite number, found"):
        encode_pairs(rows, tiny, template="instruction", max_length=64)


def test_an_answer_without_text_names_its_pair(tiny):
    with pytest.raises(UserError, match="pair 2: an answer has no text"):
        encode_pairs(
            [Preference(QUESTION, "4", "5"), Preference(QUESTION, "4", " \n")],
            tiny,
            template="instruction",
            max_length=64,
        )


def test_equal_sides_are_dropped_and_counted(tiny):
    # the template strips answers
    rows = [Preference(QUESTION, "four", "four \n"), Preference(QUESTION, "four", "five")]
    found, report = encode_pairs(rows, tiny, template="instruction", max_length=64)
    assert [p.row for p in found] == rows[1:]
    assert (report.total, report.kept, report.same) == (2, 1, 1)
    assert "1 of 2 pairs kept (0 too long, 1 with two equal sides" in str(report)
    with pytest.raises(UserError, match="no pair left"):
        encode_pairs(rows[:1], tiny, template="instruction", max_length=64)


def test_pairs_that_the_chat_template_refuses_are_dropped_and_counted(root):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(root / "mlx_posttrain" / "assets" / "tiny")
    tok.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    bad = Preference((Turn("assistant", "Hello."), *QUESTION), "Four.", "Five.")
    good = Preference(QUESTION, "Four.", "Five.")
    found, report = encode_pairs([bad, good, bad], tok, template="chat", max_length=64)
    assert [p.row for p in found] == [good] and (report.total, report.kept, report.refused) == (3, 1, 2)
    assert "; 2 dropped: the tokenizer's chat template refuses the turns ['assistant']: no" in str(report)
    with pytest.raises(UserError, match=r"choose another data.template"):
        encode_pairs([bad], tok, template="chat", max_length=64)
    turns = [QUESTION, bad.prompt]
    assert pairs.encode_answers(turns[:1], ["Four."], tok, "chat", 64) == [found[0].chosen.tokens]
    with pytest.raises(UserError, match="answer 2: the tokenizer's chat template refuses"):
        pairs.encode_answers(turns, ["Four.", "Four."], tok, "chat", 64)


@pytest.mark.parametrize("system", [False, True])
def test_a_long_dialogue_loses_its_oldest_exchanges_and_no_more(tiny, system):
    """Every maximum length is compared with leaving out one exchange after the other."""
    whole = talk(6, system=system)
    # the rejected side is the longer one
    row = Preference(whole, "Four.", "That would be five, unless it is six.")
    head = whole[: int(system)]
    rests = [head + whole[int(system) + 2 * i :] for i in range(7)]
    sides = [(side(tiny, rest, row.chosen), side(tiny, rest, row.rejected)) for rest in rests]
    lengths = [len(rejected.tokens) for _, rejected in sides]
    assert lengths == sorted(set(lengths), reverse=True)
    other = Preference(QUESTION, "4", "5")
    for length in range(lengths[-1] - 2, lengths[0] + 2):
        expected = next((i for i, n in enumerate(lengths) if n <= length), None)
        found, report = encode_pairs([row, other], tiny, template="instruction", max_length=length)
        assert (report.long, report.shortened) == (int(expected is None), int(expected not in (None, 0)))
        assert report.kept == len(found) == (1 if expected is None else 2)
        if expected is not None:
            assert (found[0].chosen, found[0].rejected) == sides[expected]
            assert found[0].row is row  # the report and the samples show the dialogue as it was


def test_one_long_answer_drops_its_pair(tiny):
    rows = [Preference(QUESTION, "4", "five " * 100), Preference(QUESTION, "4", "5")]
    found, report = encode_pairs(rows, tiny, template="instruction", max_length=64)
    assert [p.row for p in found] == rows[1:] and report.long == 1
    with pytest.raises(UserError, match=r"0 of 1 pairs kept \(1 too long.*raise data.max_length \(64\)"):
        encode_pairs(rows[:1], tiny, template="instruction", max_length=64)


def test_a_dialogue_of_n_exchanges_is_not_tokenised_n_times(tiny, monkeypatch):
    tokenised, encode = [], fitting._encode
    monkeypatch.setattr(
        fitting, "_encode", lambda rows, *rest: tokenised.append(len(rows)) or encode(rows, *rest)
    )
    rows = [Preference(talk(127), "4", "5"), Preference(QUESTION, "4", "5")]
    assert encode_pairs(rows, tiny, template="instruction", max_length=100)[1].shortened == 1
    assert tokenised[0] == 2 and set(tokenised[1:]) == {1}
    assert len(tokenised) <= 1 + 7


# where a score is read


@pytest.mark.parametrize(
    "tokens, pad, expected",
    [
        ([5, 6, 7], None, 2),
        ([5, 6, 7], 9, 2),
        ([5, 6, 9], 9, 1),  # GPT-2: the closing EOS is stepped over
        ([5, 6, 9], None, 2),
        ([9, 5, 9, 6, 9, 9, 9], 9, 3),  # an EOS within a dialogue is not the end
        ([0, 4, 0], 0, 1),
        ([9, 9, 9], 9, 0),
        ([9], 9, 0),
    ],
)
def test_last_token(tokens, pad, expected):
    assert last_token(tokens, pad) == expected


EOS = 11
SITUATIONS = {
    "pad is EOS": (EOS, [[1, 2, 3, EOS], [4, EOS], [1, EOS, 2, 5, 6, EOS], [7, 8], [EOS, 3], [EOS, EOS]]),
    "a pad of its own": (
        10,
        [[1, 2, 3, EOS], [4, EOS], [1, EOS, 2, 5, 6, EOS], [7, 8], [1, 10, 2, 10, 10], [10, 10, 10]],
    ),
    "pad is 0": (0, [[1, 2, 3, EOS], [0, 4], [5, 0], [0]]),
    "no pad, one row": (None, [[1, 2, EOS]]),
}


@pytest.mark.parametrize("pad, rows", SITUATIONS.values(), ids=SITUATIONS)
def test_scores_are_read_where_transformers_reads_them(pad, rows):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    size = {
        "vocab_size": 12,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
    }
    model = GPT2ForSequenceClassification(
        GPT2Config(**size, num_labels=1, pad_token_id=pad, eos_token_id=EOS)
    ).eval()
    longest = max(map(len, rows))
    theirs = torch.tensor([row + [pad or 0] * (longest - len(row)) for row in rows])
    batch = collate_scores(rows, pad)
    with torch.no_grad():
        expected = model(theirs).logits[:, 0]
        everywhere = model.score(
            model.transformer(torch.tensor(batch.tokens, dtype=torch.long)).last_hidden_state
        )[..., 0]
    found = everywhere.flatten()[torch.tensor(batch.index, dtype=torch.long)]
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert everywhere.std() > 0.1  # so that another position would be seen


# batches


def test_collate_scores_by_hand():
    batch = collate_scores([[5, 6, 9], [7], [8, 9, 4, 9]], 9)
    assert batch.tokens.shape == (3, 8)
    assert batch.tokens[:, :5].tolist() == [[5, 6, 9, 0, 0], [7, 0, 0, 0, 0], [8, 9, 4, 9, 0]]
    assert not batch.tokens[:, 4:].any()
    assert batch.index.tolist() == [1, 8, 2 * 8 + 2]
    assert batch.row.tolist() == [0, 1, 2]
    assert batch.mask.tolist() == batch.weight.tolist() == [1.0, 1.0, 1.0]
    assert batch.target.tolist() == [0, 0, 0]
    assert {a.dtype for a in (batch.tokens, batch.index, batch.target, batch.row)} == {np.dtype(np.int32)}
    assert batch.mask.dtype == batch.weight.dtype == np.float32


def test_padding_stays_within_the_context():
    assert collate_scores([[1] * 33], 9).tokens.shape == (1, 40)
    batch = collate_scores([[1] * 33, [1] * 36], 9, 36)
    assert batch.tokens.shape == (2, 36) and batch.index.tolist() == [32, 71]
    with pytest.raises(ValueError, match="a row of 37 tokens does not fit a context of 36"):
        collate_scores([[1] * 37], 9, 36)


def test_a_row_of_several_pairs_stands_once():
    """Answers 1 > 2 > 3 to prompt 7 make three pairs of three rows.

    Prompt 8 has the same answers and its own rows.
    """
    ranked = [pair(0, 7, 4, 1, 2), pair(1, 7, 4, 1, 3), pair(2, 7, 4, 2, 3), pair(3, 8, 4, 1, 2)]
    margins = [0.5, 1.0, 0.0, 2.0]
    ranked = [Pair(p.chosen, p.rejected, p.prompt, p.row, m) for p, m in zip(ranked, margins, strict=True)]
    batch = PairCollator(None, None, score=True)(ranked, {})
    assert len(batch.tokens) == 5
    assert batch.extra["chosen"].tolist() == [0, 0, 1, 2]
    assert batch.extra["rejected"].tolist() == [1, 3, 3, 4]
    for i, p in enumerate(ranked):
        for name in ("chosen", "rejected"):
            assert tuple(batch.tokens[batch.extra[name][i], :4].tolist()) == getattr(p, name).tokens
    assert batch.extra["margin"].tolist() == margins and batch.extra["pair_weight"].tolist() == [1.0] * 4
    assert {name: a.dtype for name, a in batch.extra.items()} == {
        "chosen": np.int32,
        "rejected": np.int32,
        "margin": np.float32,
        "pair_weight": np.float32,
    }
    assert batch.units == batch.count == 4.0  # a loss is averaged over pairs, not over the five rows


def test_without_scores_every_answer_token_is_a_position():
    """Answers of two and of one token to prompt 7, the first in two pairs: three rows, four positions."""
    best, good, bad = (
        Example((7, 7, *answer), (False, False) + (True,) * len(answer)) for answer in ((1, 2), (3,), (4,))
    )
    row = Preference(QUESTION, "", "")
    collator = PairCollator(None, 8, score=False)
    extra = {"ref_logprobs": {best: np.array([-1.0, -2.0]), good: np.array([-3.0]), bad: np.array([-4.0])}}
    batch = collator([Pair(best, good, 7, row, 0.5), Pair(best, bad, 7, row)], extra)
    assert batch.tokens.tolist() == [[7, 7, 1, 2, 0, 0, 0, 0], [7, 7, 3] + [0] * 5, [7, 7, 4] + [0] * 5]
    assert batch.mask.tolist() == [1.0] * 4 + [0.0] * 60
    assert batch.index[:4].tolist() == [1, 2, 8 + 1, 16 + 1] and batch.target[:4].tolist() == [1, 2, 3, 4]
    assert batch.row[:4].tolist() == [0, 0, 1, 2]
    assert (batch.extra["chosen"].tolist(), batch.extra["rejected"].tolist()) == ([0, 0], [1, 2])
    assert batch.extra["margin"].tolist() == [0.5, 0.0] and batch.units == batch.count == 2.0
    assert batch.extra["ref_logprobs"].tolist() == [-1.0, -2.0, -3.0, -4.0] + [0.0] * 60
    with pytest.raises(ValueError, match="a row of 4 tokens does not fit a context of 3"):
        PairCollator(None, 3, score=False)([Pair(best, good, 7, row)], {})


# the order of an epoch


def settings(**changes: Any) -> TrainSection:
    return TrainSection(**{"batch_size": 8, **changes})


def data(train: list[Pair], seed: int = 0, held_out: tuple[Pair, ...] = (), **changes: Any) -> Dataset:
    collator = PairCollator(None, None, score=True)
    return Dataset(train, held_out, collator, settings(**changes), seed, groups=[p.prompt for p in train])


def epoch(made: Dataset, number: int = 0) -> list[list[list[int]]]:
    return [made.rows(number * made.steps_per_epoch + i) for i in range(made.steps_per_epoch)]


def flat(parts: list) -> list[int]:
    return [i for part in parts for i in (flat(part) if isinstance(part, list) else [part])]


def uneven(count: int = 60) -> list[Pair]:
    """Prompts with 1 to 6 pairs and rows of 4 to 120 tokens; the pairs of a prompt lie far apart."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(4, 120, count)
    made = [
        pair(0, prompt, int(lengths[prompt]), 1, 2 + n)
        for prompt in range(count)
        for n in range(1 + prompt % 6)
    ]
    return [made[i] for i in rng.permutation(len(made))]


@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": 1}, {"grad_accumulation": 4}, {"token_budget": 256}, {"batch_size": 1000}]
)
def test_every_pair_once_per_epoch_and_prompts_stay_together(changes):
    train = uneven()
    made = data(train, **changes)
    for number in range(3):
        order = epoch(made, number)
        assert sorted(flat(order)) == list(range(len(train)))
        assert all(part for step in order for part in step)
        home = [{train[i].prompt for i in part} for step in order for part in step]
        assert sum(map(len, home)) == len({p.prompt for p in train})  # no prompt in two micro-batches


def test_a_micro_batch_has_at_most_batch_size_pairs_unless_one_prompt_has_more():
    train = uneven()
    parts = [part for step in epoch(data(train, batch_size=4)) for part in step]
    crowded = [part for part in parts if len(part) > 4]
    assert crowded and all(len({train[i].prompt for i in part}) == 1 for part in crowded)
    sizes = Counter(len(part) for part in parts)
    assert sizes[3] + sizes[4] > 5  # and prompts with few pairs are put together


def test_the_batch_size_counts_pairs():
    """60 prompts have 210 pairs: 16 pairs are 4.6 prompts, so a step takes 5, 17.5 pairs on average."""
    made = data(uneven(), batch_size=16)
    assert made.steps_per_epoch == 12
    assert all(len({made.train[i].prompt for i in flat(step)}) == 5 for step in epoch(made))


def test_one_pair_a_prompt_gives_steps_of_the_batch_size():
    made = data([pair(i) for i in range(17)], batch_size=4, grad_accumulation=2)
    assert made.steps_per_epoch == made.steps == 3
    order = epoch(made)
    assert sorted(len(flat(step)) for step in order) == [1, 8, 8]
    assert all([len(part) for part in step] in ([4, 4], [1]) for step in order)
    # The same rows whatever the split into micro-batches.
    assert [sorted(flat(step)) for step in order] == [
        sorted(flat(step)) for step in epoch(data(made.train, batch_size=8))
    ]
    assert data(made.train, batch_size=8, epochs=2.5).steps == 8
    assert data(made.train, batch_size=8, steps=5).steps == 5


def test_the_order_depends_on_seed_and_epoch_alone():
    train = uneven()
    made = data(train, seed=5)
    backwards = [data(train, seed=5).rows(step) for step in reversed(range(2 * made.steps_per_epoch))][::-1]
    assert epoch(made, 0) + epoch(made, 1) == backwards  # as a resumed run meets it
    assert epoch(made, 0) != epoch(made, 1)
    assert epoch(made, 0) != epoch(data(train, seed=6), 0)


def test_rows_of_similar_length_go_together():
    rng = np.random.default_rng(0)
    train = [pair(i, length=int(n)) for i, n in enumerate(rng.integers(4, 1000, 256))]
    parts = [[len(train[i].chosen.tokens) for i in part] for step in epoch(data(train)) for part in step]
    padded, real = sum(len(p) * max(p) for p in parts), sum(map(sum, parts))
    assert padded < 1.05 * real  # batches at random: 1.8


def test_the_token_budget_counts_each_row_once():
    """16 rows of 8 tokens: eight single pairs, but fifteen pairs of one prompt or two with 16 answers."""
    made = data([pair(i) for i in range(20)], batch_size=16, token_budget=16 * 8)
    assert {len(part) for step in epoch(made) for part in step} == {8, 4}
    # Seven pairs against one best answer are eight rows a prompt.
    made = data(
        [pair(0, prompt, 4, 1, 2 + n) for prompt in range(2) for n in range(7)],
        batch_size=16,
        token_budget=16 * 8,
    )
    assert [[len(part) for part in step] for step in epoch(made)] == [[14]]
    for train, budget in ((uneven(), 256), (uneven(), 128)):
        made = data(train, batch_size=32, token_budget=budget)
        sizes = [
            (b.tokens.size, {train[i].prompt for i in r})
            for s in epoch(made)
            for r, b in zip(s, made.micro_batches(s), strict=True)
        ]
        over = [prompts for size, prompts in sizes if size > budget]
        assert all(len(prompts) == 1 for prompts in over)
        assert max(size for size, prompts in sizes if len(prompts) > 1) > budget / 2  # it is used


def test_micro_batches_hold_their_pairs():
    train = uneven()
    made = data(train)
    rows = made.rows(0)
    for part, batch in zip(rows, made.micro_batches(rows), strict=True):
        assert batch.units == len(part)
        for i, chosen, rejected in zip(part, batch.extra["chosen"], batch.extra["rejected"], strict=True):
            length = len(train[i].chosen.tokens)
            assert tuple(batch.tokens[chosen, :length].tolist()) == train[i].chosen.tokens
            assert tuple(batch.tokens[rejected, :length].tolist()) == train[i].rejected.tokens


def test_evaluation_holds_every_held_out_pair_once_within_the_budget():
    held_out = [pair(i, length=4 + i) for i in range(50)]
    batches = data([pair(0)], held_out=tuple(held_out), batch_size=2, token_budget=128).evaluation()
    assert sum(b.units for b in batches) == 50
    assert 3 * 128 < max(b.tokens.size for b in batches) <= 4 * 128
    assert max(b.units for b in batches) == 8  # four times the training batch
    prompts = [int(b.tokens[row, 0]) for b in batches for row in b.extra["chosen"]]
    assert sorted(prompts) == list(range(50))
    assert data([pair(0)]).evaluation() == []
