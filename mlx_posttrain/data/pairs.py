"""Preference pairs to batches: two answers to one prompt, scored at each row's last token.

The position of a score is decided here once, for training, scoring, PPO and export: see :func:`last_token`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_posttrain.config import TrainSection
from mlx_posttrain.data.batches import LENGTH_MULTIPLE, Batch, for_evaluation, round_up
from mlx_posttrain.data.encode import encode_all
from mlx_posttrain.data.types import Conversation, Preference, Turn
from mlx_posttrain.errors import UserError

Sides = tuple[tuple[int, ...], tuple[int, ...]]  # the token ids of the chosen and of the rejected text


@dataclass(frozen=True)
class Pair:
    """Token ids of prompt and answer, preferred and not; pairs of one prompt share its number."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prompt: int
    row: Preference
    margin: float = 0.0


@dataclass(frozen=True)
class Report:
    """What became of the rows: ``total`` is kept + long + same; a shortened dialogue is also kept."""

    total: int = 0
    kept: int = 0
    long: int = 0
    same: int = 0
    shortened: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kept:,} of {self.total:,} pairs kept ({self.long:,} too long, {self.same:,} with two "
            "equal sides, "
            f"{self.shortened:,} dialogues without their oldest turns)"
        )


def last_token(tokens: Sequence[int], pad: int | None) -> int:
    """The position at which a row's score is read: that of the last token other than ``pad``.

    The rule of transformers' ``*ForSequenceClassification`` ("rightmost id that is not pad_token_id"), so
    that an exported model scores alike. A GPT-2 has no pad token and EOS stands in for it: its score is read
    at the last token before EOS. A row of nothing but ``pad`` is read at its first position, as transformers
    does.
    """
    for position in range(len(tokens) - 1, -1, -1):
        if tokens[position] != pad:
            return position
    return 0


def encode_pairs(
    rows: Sequence[Preference], tokenizer: object, *, template: str, max_length: int, needed: bool = True
) -> tuple[list[Pair], Report]:
    """Pairs of at most ``max_length`` tokens a side, and a report of what was dropped.

    Each side has the tokens that encode.encode gives to prompt and answer, its EOS included. A dialogue that
    is too long loses its oldest exchanges, as few as it takes; a pair that is too long even then is dropped,
    since half an answer would be a text that nobody judged. A column ``margin`` becomes the pair's margin.
    Raises UserError when no pair is left of pairs that are ``needed``, for an answer without text, and for a
    margin that is no finite number.
    """
    for number, row in enumerate(rows, 1):
        if not (row.chosen.strip() and row.rejected.strip()):
            raise UserError(
                f"pair {number}: an answer has no text, so there is nothing to score; leave the pair out"
            )
    prompts: dict[tuple[Turn, ...], int] = {}
    pairs, long, same, shortened = [], 0, 0, 0
    for i, fitted in enumerate(_fitted(rows, tokenizer, template, max_length)):
        if fitted is None:
            long += 1
            continue
        (chosen, rejected), left_out = fitted
        if chosen == rejected:
            same += 1
            continue
        shortened += left_out > 0
        pairs.append(
            Pair(
                chosen,
                rejected,
                prompts.setdefault(rows[i].prompt, len(prompts)),
                rows[i],
                _margin(rows[i], i),
            )
        )
    report = Report(len(rows), len(pairs), long, same, shortened)
    if needed and not pairs:
        raise UserError(f"no pair left to train on: {report}; raise data.max_length ({max_length})")
    return pairs, report


def encode_answers(
    prompts: Sequence[Sequence[Turn]],
    answers: Sequence[str],
    tokenizer: object,
    template: str,
    context: int | None,
) -> list[tuple[int, ...] | None]:
    """For each prompt and answer the token ids that a reward model reads, as in ``encode_pairs``; None for an
    answer without text, or one that does not fit the context with its prompt: nobody judged half an answer.
    """
    found: list[tuple[int, ...] | None] = [None] * len(answers)
    said = [i for i, answer in enumerate(answers) if answer.strip()]
    if said:
        whole = [Conversation((*prompts[i], Turn("assistant", answers[i]))) for i in said]
        examples, _ = encode_all(whole, tokenizer, templates=[template], max_length=2**31, train_on="all")
        for i, example in zip(said, examples, strict=True):
            if context is None or len(example.tokens) <= context:
                found[i] = example.tokens
    return found


def _fitted(
    rows: Sequence[Preference], tokenizer: object, template: str, max_length: int
) -> list[tuple[Sides, int] | None]:
    """For each row its sides and how many of its oldest exchanges are left out, the fewest with which both
    fit; None where none do.

    Found by bisection: with one exchange less at a time a dialogue of n exchanges would be tokenised n times.
    """
    found: list[tuple[Sides, int] | None] = [None] * len(rows)
    fewest, most = [0] * len(rows), [len(_later_questions(row)) for row in rows]
    tried = [0] * len(rows)  # most dialogues fit as they are
    waiting = list(range(len(rows)))
    while waiting:
        attempts = [_without_oldest(rows[i], tried[i]) for i in waiting]
        for i, sides in zip(waiting, _sides(attempts, tokenizer, template), strict=True):
            if max(map(len, sides)) <= max_length:
                found[i], most[i] = (sides, tried[i]), tried[i] - 1
            else:
                fewest[i] = tried[i] + 1
            tried[i] = (fewest[i] + most[i]) // 2
        waiting = [i for i in waiting if fewest[i] <= most[i]]
    return found


def _sides(rows: Sequence[Preference], tokenizer: object, template: str) -> list[Sides]:
    both = [
        Conversation((*row.prompt, Turn("assistant", text)), row.templated)
        for row in rows
        for text in (row.chosen, row.rejected)
    ]
    examples, _ = encode_all(both, tokenizer, templates=[template], max_length=2**31, train_on="all")
    return [(examples[i].tokens, examples[i + 1].tokens) for i in range(0, len(examples), 2)]


def _later_questions(row: Preference) -> list[int]:
    """Where the row's turns other than system turns could begin instead of at the first."""
    return [
        i
        for i, turn in enumerate(t for t in row.prompt if t.role != "system")
        if turn.role == "user" and i > 0
    ]


def _without_oldest(row: Preference, exchanges: int) -> Preference:
    """The row without that many of its first questions and their answers; system turns stay."""
    if not exchanges:
        return row
    system = [t for t in row.prompt if t.role == "system"]
    turns = [t for t in row.prompt if t.role != "system"]
    return replace(row, prompt=(*system, *turns[_later_questions(row)[exchanges - 1] :]))


def _margin(row: Preference, number: int) -> float:
    value = row.extra.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"pair {number + 1}: the column 'margin' must be a finite number, found {value!r}")
    return float(value)


def collate_rows(rows: Sequence[Sequence[int]], pad: int | None, context: int | None = None) -> Batch:
    """B rows of token ids as a batch with one position each, that of the row's score: index, target (unused),
    weight, row are [B].

    Raises ValueError for a row longer than ``context``.
    """
    longest = max(map(len, rows))
    if context is not None and longest > context:
        raise ValueError(f"a row of {longest} tokens does not fit a context of {context}")
    length = min(round_up(longest, LENGTH_MULTIPLE), context or 2**31)
    tokens = np.zeros((len(rows), length), np.int32)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
    number = np.arange(len(rows), dtype=np.int32)
    index = number * length + np.array([last_token(row, pad) for row in rows], np.int32)
    return Batch(
        tokens, index.astype(np.int32), np.zeros(len(rows), np.int32), np.ones(len(rows), np.float32), number
    )


def collate_pairs(pairs: Sequence[Pair], pad: int | None, context: int | None = None) -> Batch:
    """P pairs as a batch in which every distinct row stands once, however many pairs it is part of.

    ``extra``: chosen, rejected [P] int32 row numbers, margin and pair_weight [P] float32; ``units`` is P.
    """
    rows: dict[tuple[int, ...], int] = {}
    chosen = [rows.setdefault(pair.chosen, len(rows)) for pair in pairs]
    rejected = [rows.setdefault(pair.rejected, len(rows)) for pair in pairs]
    batch = collate_rows(list(rows), pad, context)
    extra = {
        "chosen": np.array(chosen, np.int32),
        "rejected": np.array(rejected, np.int32),
        "margin": np.array([pair.margin for pair in pairs], np.float32),
        "pair_weight": np.ones(len(pairs), np.float32),
    }
    return Batch(
        batch.tokens, batch.index, batch.target, batch.weight, batch.row, extra, units=float(len(pairs))
    )


class PairData:
    """Training and held-out pairs, and the batches of any step: what training.fit asks for. Pairs of one
    prompt are never parted.

    A step takes as many prompts as have ``batch_size * accumulate`` pairs on average, so that the number of
    steps does not depend on an epoch's order; with one pair to a prompt that is ``batch_size * accumulate``
    prompts. A token budget counts each distinct row once.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        settings: TrainSection,
        seed: int,
        context: int | None,
        pad: int | None,
    ):
        self.train, self.held_out, self.settings, self.seed, self.context, self.pad = (
            train,
            held_out,
            settings,
            seed,
            context,
            pad,
        )
        self.lengths = [max(len(p.chosen), len(p.rejected)) for p in train]
        groups: dict[int, list[int]] = {}
        for i, pair in enumerate(train):
            groups.setdefault(pair.prompt, []).append(i)
        self._groups = list(groups.values())
        self._epoch = -1
        self._order: list[list[list[int]]] = []
        self.steps_per_epoch = len(self._steps(0))
        self.steps = settings.steps or max(1, int(np.ceil(settings.epochs * self.steps_per_epoch)))

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        s = self.settings
        rng = np.random.default_rng([self.seed, epoch])
        order = [self._groups[i] for i in rng.permutation(len(self._groups))]
        per_step = max(1, round(s.batch_size * s.accumulate * len(order) / len(self.train)))
        window: list[list[list[int]]] = []
        for begin in range(0, len(order), 32 * per_step):
            ascending = sorted(
                order[begin : begin + 32 * per_step], key=lambda g: max(self.lengths[i] for i in g)
            )
            window += [ascending[i : i + per_step] for i in range(0, len(ascending), per_step)]
        rng.shuffle(window)
        return [self._micro(groups) for groups in window]

    def _micro(self, groups: list[list[int]]) -> list[list[int]]:
        s = self.settings
        micro: list[list[int]] = [[]]
        for group in groups:
            joined = micro[-1] + group
            distinct = len({side for i in joined for side in (self.train[i].chosen, self.train[i].rejected)})
            padded = distinct * round_up(max(self.lengths[i] for i in joined), LENGTH_MULTIPLE)
            if micro[-1] and (
                len(joined) > s.batch_size or (s.token_budget is not None and padded > s.token_budget)
            ):
                micro.append(list(group))
            else:
                micro[-1] = joined
        return micro

    def rows(self, step: int) -> list[list[int]]:
        """Pair numbers of a step, by micro-batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._steps(epoch), epoch
        return self._order[position]

    def micro_batches(self, rows: list[list[int]]) -> list[Batch]:
        """The batches of those pairs."""
        return [collate_pairs([self.train[i] for i in part], self.pad, self.context) for part in rows]

    def evaluation(self) -> list[Batch]:
        """Held-out pairs in batches, larger than those of training: see batches.EVALUATION_FACTOR."""
        lengths = [max(len(p.chosen), len(p.rejected)) for p in self.held_out]
        parts = for_evaluation(
            lengths, self.settings.batch_size, self.settings.token_budget and self.settings.token_budget // 2
        )
        return [collate_pairs([self.held_out[i] for i in part], self.pad, self.context) for part in parts]
