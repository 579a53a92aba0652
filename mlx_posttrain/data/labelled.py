"""Labelled answers to batches: each answer beside one that was given to another prompt (KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_posttrain.config import DataSection, Recipe
from mlx_posttrain.console import log
from mlx_posttrain.data import drops, formats, mixture
from mlx_posttrain.data.batches import Batch, collate, padded_positions, with_extra
from mlx_posttrain.data.dataset import Collator, Dataset, ExtraRows
from mlx_posttrain.data.fitting import Asked, fit
from mlx_posttrain.data.read import ModelFacts, describe, read_rows, say_own_chat, say_specials, with_system
from mlx_posttrain.data.split import split_rows
from mlx_posttrain.data.types import Example, Judged, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError

#: What precedes the name of an array in ``Batch.extra`` that belongs to the mismatched answers.
MISMATCHED = "mismatched_"


@dataclass(frozen=True)
class Report:
    """What became of the rows: ``total`` is kept + long + refused; a shortened dialogue is also kept.

    ``refusal``: why the chat template refused the first row that it did. ``cut``: mismatched answers.
    """

    total: int
    kept: int
    long: int
    shortened: int
    cut: int
    refused: int
    refusal: str

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by reason."""
        return {"too long": self.long, self.refusal or "refused by the chat template": self.refused}

    def __str__(self) -> str:
        refused = f"; {self.refused:,} dropped: {self.refusal}" if self.refused else ""
        return (
            f"{self.kept:,} of {self.total:,} labelled answers kept ({self.long:,} too long, "
            f"{self.shortened:,} dialogues without their oldest turns; {self.cut:,} of the answers to other "
            f"prompts cut){refused}"
        )


def encode_labelled(
    rows: Sequence[Labelled],
    tokenizer: object,
    *,
    template: str | Sequence[str],
    max_length: int,
    seed: int,
    needed: bool = True,
) -> tuple[list[Judged], Report]:
    """Answers of at most ``max_length`` tokens with their prompt, and a report of what was dropped.

    template: of all rows, or of each. As of pairs (:func:`mlx_posttrain.data.pairs.encode_pairs`) a dialogue
    may lose its oldest exchanges, and an answer that does not fit even then is dropped: nobody judged half of
    it. A mismatched answer, which nobody judged anyway, is cut. Raises UserError when nothing is left of rows
    that are ``needed``, where these all ask the same, and for an answer without text.
    """
    for number, row in enumerate(rows, 1):
        if not row.completion.strip():
            raise UserError(f"row {number}: the answer has no text, so nothing was judged; leave the row out")
    fitted = fit(
        [Asked(row.prompt, (row.completion,), row.templated) for row in rows], tokenizer, template, max_length
    )
    refusals = [one for one in fitted if isinstance(one, str)]
    kept = [(row, *one) for row, one in zip(rows, fitted, strict=True) if isinstance(one, tuple)]
    answers = [example for _, (example,), _ in kept]
    numbers: dict[tuple[Turn, ...], int] = {}
    prompts = np.array([numbers.setdefault(row.prompt, len(numbers)) for row, *_ in kept], int)
    joined: list[Example] = []
    if len(numbers) > 1:
        joined = [exchange(answers[i], answers[j]) for i, j in enumerate(mismatch(prompts, seed))]
    report = Report(
        len(rows),
        len(kept),
        len(rows) - len(kept) - len(refusals),
        sum(left_out > 0 for *_, left_out in kept),
        sum(len(one.tokens) > max_length for one in joined),
        len(refusals),
        "".join(refusals[:1]),
    )
    if needed and not kept:
        advice = "choose another data.template" if refusals else f"raise data.max_length ({max_length})"
        raise UserError(f"no answer left to train on: {report}; {advice}")
    if needed and not joined:
        raise UserError(
            f"all {len(kept):,} answers are to one prompt: how far the policy is from its reference is "
            "estimated on answers to other prompts, so at least two different prompts are needed"
        )
    return [
        Judged(answer, _cut(other, max_length), row.label, int(prompt), row)
        for (row, *_), answer, other, prompt in zip(kept, answers, joined, prompts, strict=False)
    ], report


def mismatch(prompts: np.ndarray, seed: int) -> np.ndarray:
    """[R] for each row the number of a row with another prompt, by seed: nearly a permutation.

    prompts: [R] numbers of the rows' prompts, at least two of them different. Rows that a permutation gives
    an answer to their own prompt draw one from all other prompts instead.
    """
    rng = np.random.default_rng([seed, 0x6B70])
    found = rng.permutation(len(prompts))
    same = prompts[found] == prompts
    for prompt in np.unique(prompts[same]):
        rows = np.flatnonzero(same & (prompts == prompt))
        found[rows] = rng.choice(np.flatnonzero(prompts != prompt), len(rows))
    return found


def exchange(asked: Example, answered: Example) -> Example:
    """The prompt of the first example with the answer of the second."""
    start, other = asked.answer_start, answered.answer_start
    return Example(
        asked.tokens[:start] + answered.tokens[other:], asked.trained[:start] + answered.trained[other:]
    )


def _cut(example: Example, length: int) -> Example:
    return Example(example.tokens[:length], example.trained[:length])


class LabelledCollator:
    """Labelled answers as batches, with their mismatched answers as a second batch in ``extra``.

    Apart, since no gradient flows into the mismatched ones: their backward pass never runs. Both have one
    shape, so that a compiled step meets as few shapes as with rows alone.
    """

    rows_per_item = 2

    def __init__(self, context: int | None):
        self.context = context

    def examples(self, item: Judged) -> tuple[Example, ...]:
        """The answer and the mismatched answer."""
        return (item.answer, item.mismatched)

    def row_count(self, items: Sequence[Judged]) -> int:
        """Rows of both kinds."""
        return 2 * len(items)

    def __call__(self, items: Sequence[Judged], extra: ExtraRows) -> Batch:
        """The batch of these items' answers; its units are the answers.

        ``extra`` gets label (1 good, 0 bad) and row_weight, [R] float32, and the fields and extras of the
        mismatched answers' batch under names that begin with MISMATCHED.
        """
        rows = [*(item.answer for item in items), *(item.mismatched for item in items)]
        both = collate(rows, self.context)
        both = with_extra(both, {name: [known[row] for row in rows] for name, known in extra.items()})
        behind = both.row >= len(items)
        sizes = [int(((both.mask > 0) & (behind == side)).sum()) for side in (False, True)]
        size = padded_positions(max(1, *sizes))
        batch, other = (_part(both, first, len(items), size) for first in (0, len(items)))
        fields = ("tokens", "index", "target", "row", "mask", "weight")
        return replace(
            batch,
            extra={
                **batch.extra,
                **{MISMATCHED + name: getattr(other, name) for name in fields},
                **{MISMATCHED + name: values for name, values in other.extra.items()},
                "label": np.array([item.good for item in items], np.float32),
                "row_weight": np.array([item.weight for item in items], np.float32),
            },
            units=float(len(items)),
        )


def _part(batch: Batch, first: int, rows: int, size: int) -> Batch:
    """The batch of ``rows`` rows from ``first``, with its positions padded to ``size``."""
    taken = np.flatnonzero((batch.mask > 0) & (batch.row >= first) & (batch.row < first + rows))

    def flat(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *values.shape[1:]), values.dtype)
        padded[: len(taken)] = values
        return padded

    return Batch(
        batch.tokens[first : first + rows],
        flat(batch.index[taken] - first * batch.tokens.shape[1]),
        flat(batch.target[taken]),
        flat(batch.row[taken] - first),
        flat(batch.mask[taken]),
        np.ones(size, np.float32),
        {name: flat(values[taken]) for name, values in batch.extra.items()},
    )


def labelled_collator(recipe: Recipe, facts: ModelFacts) -> Collator:
    """Labelled answers for losses of log-probabilities: every token of an answer is a position."""
    return LabelledCollator(facts.context)


def read_labelled(data: DataSection, *, split: str, limit: int | None, seed: int) -> list[Labelled]:
    """The labelled answers of one split; a pair becomes two. Prints what was dropped.

    Raises UserError for rows that are neither.
    """
    parsed = read_rows(data, split=split, limit=limit, seed=seed, wants="labels")
    pairs = sum(isinstance(row, Preference) for row in parsed)
    if pairs:
        log(
            f"{data.origin} {split}: {pairs:,} pairs become {2 * pairs:,} labelled answers: chosen ones are "
            "good, rejected ones bad"
        )
    found = [with_system(answer, data.system) for row in parsed for answer in _labelled(row)]
    if not found:
        raise UserError(
            f"{data.origin}: this method learns from labelled answers: rows with prompt, completion and "
            "label (true or false), or pairs with prompt, chosen and rejected; rename with data.columns, "
            "for example {completion: answer, label: thumbs_up}"
        )
    return found


def _labelled(row: formats.Record) -> list[Labelled]:
    if isinstance(row, Labelled):
        return [row]
    if isinstance(row, Preference):
        sides = ((row.chosen, True), (row.rejected, False))
        return [Labelled(row.prompt, text, label, row.templated, row.extra) for text, label in sides]
    return []


def labelled_dataset(recipe: Recipe, facts: ModelFacts, collate: Collator) -> Dataset:
    """A recipe's labelled answers as a dataset; prints what was dropped.

    Which answers are mismatched is fixed by the recipe's seed for the whole run; held-out answers are
    exchanged among themselves.
    """
    data = recipe.data
    train, held_out = split_rows(data, recipe.seed, read_labelled)
    describe(train)
    say_own_chat(data, facts.tokenizer, any(row.templated for row in train))
    length = min(data.max_length, facts.context or data.max_length)

    def encoded(rows: list[Labelled], what: str, needed: bool) -> list[Judged]:
        if not rows:
            return []
        texts = ([*(turn.content for turn in row.prompt), row.completion] for row in rows)
        say_specials(texts, facts.tokenizer, what)
        items, report = encode_labelled(
            rows,
            facts.tokenizer,
            template=mixture.templates(rows, data),
            max_length=length,
            seed=recipe.seed,
            needed=needed,
        )
        log(f"{what}: {report}")
        if needed:
            drops.add(report.dropped)
        if not items:
            log(f"{what}: fewer than two prompts can be used, so nothing is evaluated during training")
        return items

    return Dataset(
        encoded(train, "training answers", True),
        encoded(held_out, "held-out answers", False),
        collate,
        recipe.train,  # type: ignore[arg-type]
        recipe.seed,
        train_rows=train,
        held_out_rows=held_out,
    )
