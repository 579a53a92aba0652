"""Training and held-out examples, and the batches of any step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mlx_posttrain.config import TrainSection
from mlx_posttrain.data import batches
from mlx_posttrain.data.types import Example

Figures = Mapping[str, Sequence[np.ndarray]]


class TrainingData(Protocol):
    """What the loop asks its data for; :class:`Data` for rows to imitate, pairs.PairData for pairs."""

    settings: TrainSection
    steps: int
    steps_per_epoch: int

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of a step, by micro-batch."""

    def micro_batches(self, rows: list[list[int]]) -> list[batches.Batch]:
        """The batches of those rows."""

    def evaluation(self) -> list[batches.Batch]:
        """Held-out rows in batches."""


class Data:
    """Training and held-out examples, and the batches of any step."""

    def __init__(
        self,
        train: Sequence[Example],
        held_out: Sequence[Example],
        settings: TrainSection,
        seed: int,
        context: int | None,
    ):
        self.train, self.held_out, self.settings, self.seed, self.context = (
            train,
            held_out,
            settings,
            seed,
            context,
        )
        #: What batches carry besides, by name: for each training row, and each held-out row, an array over
        #: its trained tokens.
        self.figures: Figures = {}
        self.held_out_figures: Figures = {}
        self.lengths = [len(e.tokens) for e in train]
        self._epoch = -1
        self.steps_per_epoch = math.ceil(len(train) / (settings.batch_size * settings.accumulate))
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * self.steps_per_epoch))

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of a step, by micro-batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            s = self.settings
            self._order = batches.steps(
                self.lengths,
                batch_size=s.batch_size,
                accumulate=s.accumulate,
                seed=self.seed,
                epoch=epoch,
                token_budget=s.token_budget,
            )
            self._epoch = epoch
        return self._order[position]

    def micro_batches(self, rows: list[list[int]]) -> list[batches.Batch]:
        """The batches of those rows."""
        return [self._batch(self.train, self.figures, r) for r in rows]

    def evaluation(self) -> list[batches.Batch]:
        """Held-out rows in batches, larger than those of training: see batches.EVALUATION_FACTOR."""
        lengths = [len(e.tokens) for e in self.held_out]
        rows = batches.for_evaluation(lengths, self.settings.batch_size, self.settings.token_budget)
        return [self._batch(self.held_out, self.held_out_figures, r) for r in rows]

    def _batch(self, examples: Sequence[Example], figures: Figures, rows: list[int]) -> batches.Batch:
        batch = batches.collate([examples[i] for i in rows], self.context)
        return batches.with_rows(batch, {name: [values[i] for i in rows] for name, values in figures.items()})
