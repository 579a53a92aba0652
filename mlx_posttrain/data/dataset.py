"""Training and held-out items, and the batches of any step.

An item is what a loss is defined on: an :class:`~mlx_posttrain.data.types.Example` (a row), or a
:class:`~mlx_posttrain.data.types.Pair` of them. A :class:`Collator` makes batches of items; a
:class:`Dataset` says which items go together in which step, from the settings and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlx_posttrain.config import TrainSection
from mlx_posttrain.data.batches import LENGTH_MULTIPLE, Batch, collate, for_evaluation, round_up, with_extra
from mlx_posttrain.data.types import Example

#: Arrays over an example's trained tokens, by name and example: what a reference made of it, for instance.
ExtraRows = Mapping[str, Mapping[Example, np.ndarray]]
WINDOW = 32  # steps within which items are sorted by length


class Collator(Protocol):
    """How items of one kind become batches."""

    rows_per_item: int
    context: int | None  # the model's longest sequence in tokens; None where it has no bound

    def examples(self, item: Any) -> tuple[Example, ...]:
        """The rows of an item."""

    def row_count(self, items: Sequence[Any]) -> int:
        """How many rows a batch of these items has."""

    def __call__(self, items: Sequence[Any], extra: ExtraRows) -> Batch:
        """The batch of these items."""


class RowCollator:
    """Examples as they are; every trained token is a position of the batch."""

    rows_per_item = 1

    def __init__(self, context: int | None):
        self.context = context

    def examples(self, item: Example) -> tuple[Example, ...]:
        """The item itself."""
        return (item,)

    def row_count(self, items: Sequence[Example]) -> int:
        """One row for each item."""
        return len(items)

    def __call__(self, items: Sequence[Example], extra: ExtraRows) -> Batch:
        """See :func:`mlx_posttrain.data.batches.collate`."""
        batch = collate(items, self.context)
        return with_extra(batch, {name: [rows[item] for item in items] for name, rows in extra.items()})


@dataclass
class Dataset:
    """Items, and which of them make up each step.

    groups: for each training item the number of its group; a group is never parted. None: each item is one.
    extra: what batches carry besides, see :data:`ExtraRows`.
    train_rows, held_out_rows: the rows as they were read, for samples and reports; they may be more than the
    items, since rows that are too long are dropped. untemplated: rows are taken as they stand.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    collate: Collator
    settings: TrainSection
    seed: int
    groups: Sequence[int] | None = None
    train_rows: Sequence[Any] = ()
    held_out_rows: Sequence[Any] = ()
    untemplated: bool = False
    extra: dict[str, dict[Example, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = range(len(self.train)) if self.groups is None else self.groups
        members: dict[int, list[int]] = {}
        for i, number in enumerate(numbers):
            members.setdefault(number, []).append(i)
        self._groups = list(members.values())
        self.lengths = [self._length(item) for item in self.train]
        # A step takes as many groups as have that many items on average, so that the number of steps does not
        # depend on an epoch's order.
        per_step = self.settings.batch_size * self.settings.grad_accumulation
        self._groups_per_step = max(1, round(per_step * len(self._groups) / max(1, len(self.train))))
        self._epoch, self._order = -1, []  # type: ignore[var-annotated]
        self.steps_per_epoch = math.ceil(len(self._groups) / self._groups_per_step)
        epochs = max(1, math.ceil(self.settings.epochs * self.steps_per_epoch))
        self.steps = self.settings.steps or epochs

    @property
    def context(self) -> int | None:
        """The model's longest sequence in tokens."""
        return self.collate.context

    def _length(self, item: Any) -> int:
        return max(len(example.tokens) for example in self.collate.examples(item))

    def rows(self, step: int) -> list[list[int]]:
        """Item numbers of a step, by micro-batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._steps(epoch), epoch
        return self._order[position]

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        """The order of one epoch: a list of steps, each a list of micro-batches, each a list of item numbers.

        A step holds groups of similar length (sorted within windows of 32 steps of a shuffled order, the
        steps shuffled again), so that 1 x 8 and 8 x 1 hold the same items. It depends on nothing but settings
        and seed, so a resumed run meets the same order. An epoch's last step may be smaller; no item is left
        out.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = [self._groups[i] for i in rng.permutation(len(self._groups))]
        window, per_step = WINDOW * self._groups_per_step, self._groups_per_step
        steps: list[list[list[int]]] = []
        for begin in range(0, len(order), window):
            groups = sorted(order[begin : begin + window], key=lambda g: max(self.lengths[i] for i in g))
            steps += [groups[i : i + per_step] for i in range(0, len(groups), per_step)]
        rng.shuffle(steps)
        return [self._micro_batches(groups) for groups in steps]

    def _micro_batches(self, groups: list[list[int]]) -> list[list[int]]:
        """At most ``batch_size`` items each and, with a token budget, at most that many padded tokens."""
        budget = self.settings.token_budget
        micro: list[list[int]] = [[]]
        for group in groups:
            joined = micro[-1] + group
            longest = round_up(max(self.lengths[i] for i in joined), LENGTH_MULTIPLE)
            padded = longest * self.collate.row_count([self.train[i] for i in joined]) if budget else 0
            if micro[-1] and (len(joined) > self.settings.batch_size or (budget and padded > budget)):
                micro.append(list(group))
            else:
                micro[-1] = joined
        return micro

    def micro_batches(self, rows: list[list[int]]) -> list[Batch]:
        """The batches of those items."""
        return [self._batch([self.train[i] for i in part]) for part in rows]

    def evaluation(self) -> list[Batch]:
        """All batches of :meth:`evaluation_by_source`."""
        return [batch for batches in self.evaluation_by_source().values() for batch in batches]

    def evaluation_by_source(self) -> dict[str, list[Batch]]:
        """Held-out items of each source of a mixture in batches; without a mixture all of them, by "".

        They are larger than those of training: see batches.EVALUATION_FACTOR.
        """
        budget = self.settings.token_budget and self.settings.token_budget // self.collate.rows_per_item
        found = {}
        for source in dict.fromkeys(item.source for item in self.held_out):
            items = [item for item in self.held_out if item.source == source]
            lengths = [self._length(item) for item in items]
            parts = for_evaluation(lengths, self.settings.batch_size, budget)
            found[source] = [self._batch([items[i] for i in part]) for part in parts]
        return found

    def _batch(self, items: Sequence[Any]) -> Batch:
        if not self.extra:
            return self.collate(items, {})
        examples = {e for item in items for e in self.collate.examples(item)}
        return self.collate(items, {n: rows for n, rows in self.extra.items() if examples <= rows.keys()})
