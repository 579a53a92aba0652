"""A learning-rate range test: a short run whose rate grows with every step, and what its losses suggest.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3. There the rate grows
by equal amounts; here by equal factors, as rates of adapters and of all weights lie decades apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import methods
from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError
from mlx_posttrain.training import setup

LOWEST, HIGHEST, STEPS = 1e-7, 1.0, 120
WINDOW = 9  # steps over which changes are averaged: half a decade
WORSE = 1.0  # times its starting value, by which the loss may have risen before the test ends
FELL = 0.05  # share of its starting value by which the loss must fall for a rate to be suggested


@dataclass(frozen=True)
class RangeTest:
    """Rates, and by how much the loss had changed when the step at each was taken.

    changes: loss of the step's rows less that of the starting weights on the same rows, averaged over WINDOW
    steps: rows are harder or easier by more than small rates change anything. start: the mean of the latter.
    steepest, lowest: where the loss falls fastest, and where it is lowest; beyond, it rises. Both are None
    where it never fell.
    """

    rates: Sequence[float]
    changes: Sequence[float]
    start: float
    steepest: float | None
    lowest: float | None

    @property
    def suggestion(self) -> float | None:
        """The rate where the loss falls fastest, at most a third of that where it is lowest; one digit."""
        if self.steepest is None or self.lowest is None:
            return None
        return float(f"{min(self.steepest, self.lowest / 3):.0e}")

    def text(self) -> str:
        """The curve, two rows for every half decade, and the suggestion."""
        shown = range(0, len(self.changes), WINDOW // 2)
        low, high = min(self.changes, default=0.0), max(self.changes, default=0.0)
        lines = [f"loss of the starting weights {self.start:.4f}; its change while train.lr grew:"]
        for i in shown:
            bar = "#" * round(40 * (self.changes[i] - low) / (high - low or 1))
            lines.append(f"{self.rates[i]:9.1e}  {self.changes[i]:+9.4f}  {bar}".rstrip())
        if self.suggestion is None:
            lines.append("the loss never fell: there is no rate to suggest; look at the rows")
        else:
            lines.append(
                f"suggested: train.lr={self.suggestion:g}. The loss falls fastest at {self.steepest:.1e} and "
                f"is lowest at {self.lowest:.1e}; a long run may want less. `mlx-posttrain sweep` compares "
                "rates"
            )
        return "\n".join(lines)


def range_test(rates: Sequence[float], losses: Sequence[float], starts: Sequence[float]) -> RangeTest:
    """What losses at growing rates suggest. Pure; ``losses`` may end early, where a run diverged.

    starts: the losses of the starting weights on each step's rows.
    """
    raw = np.array(losses, float) - np.array(starts[: len(losses)], float)
    half = WINDOW // 2
    changes = [float(np.mean(raw[max(0, i - half) : i + half + 1])) for i in range(len(raw))]
    start = float(np.mean(starts)) if len(starts) else 0.0
    end = int(np.argmin(changes)) if changes else 0
    rates = list(rates[: len(changes)])
    if end < 2 or changes[end] > -FELL * start:
        return RangeTest(rates, changes, start, None, None)
    slope = np.gradient(changes[: end + 1])
    return RangeTest(rates, changes, start, rates[int(np.argmin(slope))], rates[end])


def find_lr(recipe: Any, lowest: float = LOWEST, highest: float = HIGHEST, steps: int = STEPS) -> RangeTest:
    """Train a copy of the recipe's model for ``steps`` steps, from rate ``lowest`` to ``highest``.

    Ends early where the loss has risen by WORSE times its starting value. Nothing is kept, and no run
    directory made.

    Raises UserError for a method that trains on rollouts, whose loss says nothing of a rate, for one that
    trains nothing, and as setting up a run does.
    """
    method = methods.get(recipe.method)
    if method.trains_on != "rows":
        what = (
            "learns from rollouts: its loss is near 0 at any rate" if method.trains_on else "trains nothing"
        )
        raise UserError(
            f"--find-lr: {recipe.method} {what}; `mlx-posttrain sweep` compares rates by their results"
        )
    rates = np.geomspace(lowest, highest, steps).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe.model_copy(deep=True)
        recipe.output, recipe.log = str(Path(scratch) / "run"), []
        recipe.train.steps = steps
        engine, run = setup.open_run(recipe, False)
        session = setup.open_session(method, recipe, engine, run)
        learner = setup.row_learner(session)
        learner.check()
        learner.prepare()
        engine.seed(recipe.seed)
        dataset = session.dataset
        assert dataset is not None and method.loss is not None
        loss = method.loss(recipe)
        starts = [
            session.model.evaluate(loss, dataset.micro_batches(dataset.rows(step)))["loss"]
            for step in range(steps)
        ]
        losses: list[float] = []
        for step, rate in enumerate(rates):
            try:
                losses.append(learner.headline(learner.step(step, rate)))
            except FloatingPointError:
                break
            log(f"step {step + 1}/{steps}: train.lr {rate:.1e}, loss {losses[-1]:.4f}")
            if range_test(rates, losses, starts).changes[-1] > WORSE * abs(starts[step]):
                break
        run.close()
    return range_test(rates, losses, starts)
