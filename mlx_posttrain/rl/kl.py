"""How hard to pull the policy back to its reference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class FixedKL:
    """The same ``beta`` for ever."""

    def __init__(self, beta: float):
        self.beta = beta

    def update(self, kl: float, n: int) -> None:
        """Nothing to learn from ``n`` answers with a mean KL of ``kl``."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"beta": self.beta}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take it back."""
        self.beta = state["beta"]


class AdaptiveKL(FixedKL):
    """A ``beta`` that steers the KL of an answer towards ``target`` nats.

    A proportional controller on the relative error, after n answers:

        beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon

    Ziegler et al. 2019, section 2.2. More answers at once than ``horizon`` count as ``horizon``, where the
    paper's formula would let beta fall below 0.
    """

    def __init__(self, beta: float, target: float = 6.0, horizon: float = 10_000.0):
        super().__init__(beta)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Take the mean KL in nats of ``n`` answers into account."""
        self.beta *= 1.0 + float(np.clip(kl / self.target - 1.0, -0.2, 0.2)) * min(n / self.horizon, 1.0)


class LinearKL(FixedKL):
    """A ``beta`` that goes in a straight line from its first value to ``final``, which the last step has."""

    def __init__(self, beta: float, final: float, steps: int):
        super().__init__(beta)
        self.slope = (final - beta) / max(steps - 1, 1)

    def update(self, kl: float, n: int) -> None:
        """One step further, whatever the KL."""
        self.beta += self.slope


def controller(
    kind: str,
    beta: float,
    *,
    target: float = 6.0,
    horizon: float = 10_000.0,
    final: float = 0.0,
    steps: int = 1,
) -> FixedKL:
    """The controller called ``fixed``, ``adaptive`` or ``linear``. Raises ValueError for another name.

    target and horizon are those of AdaptiveKL, final and steps (of the whole run) those of LinearKL.
    """
    if kind == "fixed":
        return FixedKL(beta)
    if kind == "adaptive":
        return AdaptiveKL(beta, target, horizon)
    if kind == "linear":
        return LinearKL(beta, final, steps)
    raise ValueError(f"kind must be fixed, adaptive or linear, got {kind!r}")
