"""Preference pairs to batches: two answers to one prompt, each with its answer marked.

The position of a score is decided here once, for training, scoring, PPO and export: see :func:`last_token`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_posttrain.data.batches import Batch, collate, padded_length, with_extra
from mlx_posttrain.data.cells import number as as_number
from mlx_posttrain.data.dataset import ExtraRows
from mlx_posttrain.data.encode import encode_each
from mlx_posttrain.data.fitting import Asked, fit
from mlx_posttrain.data.types import Conversation, Example, Pair, Preference, Turn
from mlx_posttrain.errors import UserError


@dataclass(frozen=True)
class Report:
    """What became of the rows: ``total`` is kept + long + same + refused; a shortened dialogue is also kept.

    ``refusal``: why the chat template refused the first pair that it did.
    """

    total: int = 0
    kept: int = 0
    long: int = 0
    same: int = 0
    shortened: int = 0
    refused: int = 0
    refusal: str = ""

    @property
    def dropped(self) -> dict[str, int]:
        """Pairs dropped, by reason."""
        return {
            "too long": self.long,
            "two equal sides": self.same,
            self.refusal or "refused by the chat template": self.refused,
        }

    def __str__(self) -> str:
        refused = f"; {self.refused:,} dropped: {self.refusal}" if self.refused else ""
        return (
            f"{self.kept:,} of {self.total:,} pairs kept ({self.long:,} too long, {self.same:,} with two "
            "equal sides, "
            f"{self.shortened:,} dialogues without their oldest turns){refused}"
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
    rows: Sequence[Preference],
    tokenizer: object,
    *,
    template: str | Sequence[str],
    max_length: int,
    needed: bool = True,
) -> tuple[list[Pair], Report]:
    """Pairs of at most ``max_length`` tokens a side, and a report of what was dropped.

    template: of all rows, or of each. Each side has the tokens that encode.encode gives to prompt and answer,
    its EOS included. A dialogue that is too long loses its oldest exchanges, as few as it takes; a pair that
    is too long even then is dropped, since half an answer would be a text that nobody judged. A column
    ``margin`` becomes the pair's margin. Raises UserError when no pair is left of pairs that are ``needed``,
    for an answer without text, and for a margin that is no finite number.
    """
    for number, row in enumerate(rows, 1):
        if not (row.chosen.strip() and row.rejected.strip()):
            raise UserError(
                f"pair {number}: an answer has no text, so there is nothing to score; leave the pair out"
            )
    prompts: dict[tuple[Turn, ...], int] = {}
    pairs, long, same, shortened = [], 0, 0, 0
    refusals: list[str] = []
    asked = [Asked(row.prompt, (row.chosen, row.rejected), row.templated) for row in rows]
    for i, fitted in enumerate(fit(asked, tokenizer, template, max_length)):
        if fitted is None:
            long += 1
            continue
        if isinstance(fitted, str):
            refusals.append(fitted)
            continue
        (chosen, rejected), left_out = fitted
        if chosen.tokens == rejected.tokens:
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
    report = Report(len(rows), len(pairs), long, same, shortened, len(refusals), "".join(refusals[:1]))
    if needed and not pairs:
        advice = "choose another data.template" if refusals else f"raise data.max_length ({max_length})"
        raise UserError(f"no pair left to train on: {report}; {advice}")
    return pairs, report


def encode_answers(
    prompts: Sequence[Sequence[Turn]],
    answers: Sequence[str],
    tokenizer: object,
    template: str,
    context: int | None,
) -> list[tuple[int, ...] | None]:
    """Token ids that a reward model reads, for each prompt and answer, as in ``encode_pairs``.

    None for an answer without text, or one that does not fit the context with its prompt: nobody judged half
    an answer. Raises UserError for one that the chat template refuses.
    """
    found: list[tuple[int, ...] | None] = [None] * len(answers)
    said = [i for i, answer in enumerate(answers) if answer.strip()]
    if said:
        whole = [Conversation((*prompts[i], Turn("assistant", answers[i]))) for i in said]
        outcomes = encode_each(whole, tokenizer, templates=[template], max_length=2**31, train_on="all")
        for i, outcome in zip(said, outcomes, strict=True):
            if outcome.example is None:
                raise UserError(f"answer {i + 1}: {outcome.reason}")
            if context is None or len(outcome.example.tokens) <= context:
                found[i] = outcome.example.tokens
    return found


def _margin(row: Preference, number: int) -> float:
    value = row.extra.get("margin", 0.0)
    margin = as_number(value)
    if margin is None:
        raise UserError(f"pair {number + 1}: the column 'margin' must be a finite number, found {value!r}")
    return margin


def collate_scores(rows: Sequence[Sequence[int]], pad: int | None, context: int | None = None) -> Batch:
    """B rows of token ids as a batch with one position each, that of the row's score.

    index, target (unused), row, mask and weight are [B]. Raises ValueError for a row longer than ``context``.
    """
    longest = max(map(len, rows))
    if context is not None and longest > context:
        raise ValueError(f"a row of {longest} tokens does not fit a context of {context}")
    length = min(padded_length(longest), context or 2**31)
    tokens = np.zeros((len(rows), length), np.int32)
    for r, row in enumerate(rows):
        tokens[r, : len(row)] = row
    number = np.arange(len(rows), dtype=np.int32)
    index = number * length + np.array([last_token(row, pad) for row in rows], np.int32)
    ones = np.ones(len(rows), np.float32)
    return Batch(tokens, index.astype(np.int32), np.zeros(len(rows), np.int32), number, ones, ones)


class PairCollator:
    """Pairs as batches in which every distinct row stands once, however many pairs it is part of.

    score: each row has one position, that of its score (a reward model); else every answer token is one, for
    losses of log-probabilities. pad: see :func:`last_token`. context: the longest row, None without a bound.
    beyond: weight of the tokens by which an answer is longer than the other of its pair (Liu et al. 2024,
    "Length Desensitization in DPO"); an answer in several pairs may then stand more than once.
    """

    rows_per_item = 2

    def __init__(self, pad: int | None, context: int | None, score: bool, beyond: float = 1.0):
        self.pad, self.context, self.score, self.beyond = pad, context, score, beyond

    def examples(self, item: Pair) -> tuple[Example, ...]:
        """Both sides."""
        return (item.chosen, item.rejected)

    def row_count(self, items: Sequence[Pair]) -> int:
        """Distinct rows."""
        return len(self._rows(items))

    def _rows(self, items: Sequence[Pair]) -> dict[tuple[Example, int], int]:
        """The number of each distinct row: an example, and of how many answer tokens the weight is 1."""
        rows: dict[tuple[Example, int], int] = {}
        chosen = [(pair.chosen, self._common(pair)) for pair in items]
        for row in (*chosen, *((pair.rejected, self._common(pair)) for pair in items)):
            rows.setdefault(row, len(rows))
        return rows

    def _common(self, pair: Pair) -> int:
        """Length in tokens up to which both answers' tokens count alike; 0 where all do."""
        return 0 if self.beyond == 1 else min(sum(e.trained[1:]) for e in (pair.chosen, pair.rejected))

    def __call__(self, items: Sequence[Pair], extra: ExtraRows) -> Batch:
        """The batch of these pairs; its units are the pairs.

        ``extra`` gets chosen, rejected [P] int32 row numbers, margin and pair_weight [P] float32.
        """
        rows = self._rows(items)
        examples = [example for example, _ in rows]
        if self.score:
            batch = collate_scores([e.tokens for e in examples], self.pad, self.context)
        else:
            batch = collate(examples, self.context)
        batch = with_extra(batch, {name: [known[row] for row in examples] for name, known in extra.items()})
        if self.beyond != 1:
            place = np.concatenate([np.arange(sum(e.trained[1:])) for e in examples])
            common = np.array([length for _, length in rows])[batch.row[: len(place)]]
            batch.weight[: len(place)] = np.where(place < common, 1.0, self.beyond)
        sides = {
            "chosen": np.array([rows[pair.chosen, self._common(pair)] for pair in items], np.int32),
            "rejected": np.array([rows[pair.rejected, self._common(pair)] for pair in items], np.int32),
            "margin": np.array([pair.margin for pair in items], np.float32),
            "pair_weight": np.ones(len(items), np.float32),
        }
        return replace(batch, extra={**batch.extra, **sides}, units=float(len(items)))
