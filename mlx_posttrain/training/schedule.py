"""The learning-rate schedule, one function for both engines."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, steps: int, peak: float, schedule: str = "cosine", warmup: float = 0.0, floor: float = 0.0
) -> float:
    """Learning rate of optimizer step ``step``, counted from 0 to ``steps - 1``.

    Linear warm-up over ``warmup`` steps (a share of all steps below 1, or a number), starting above zero so
    that no step is wasted, then constant, linear or half a cosine to ``floor`` (Loshchilov & Hutter 2017, eq.
    5, without restarts). Raises ValueError for an unknown schedule.
    """
    ramp = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if step < ramp:
        return peak * (step + 1) / ramp
    done = (step - ramp) / max(1, steps - ramp)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return floor + (peak - floor) * (1.0 - done)
    if schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown schedule {schedule!r}: cosine, linear or constant")
