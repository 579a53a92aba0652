"""Ratios of times, given only where two engines or trainers did the same work.

Our engines are compared with the first of them. A baseline (another trainer) is compared with our engine on
the same library and device. It must start and learn alike: on its first batch, before any update, the same
tokens must count and give the same loss (of pairs and labelled answers their negative log-likelihood, since
the loss is the same for every model then), and over the units the loss must fall about as far. The first
rollout comes from unchanged weights: its KL from the reference must be 0, and other answers of the same
policy must get the same mean score within its standard error. Decoded answers must be as many and as likely.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_posttrain.bench.kinds import on_rollouts

#: Largest relative difference between losses of our engines, which compute the same: in training, and of
#: sampled answers, where one draw on the other side of a boundary changes every later token.
LOSS_TOLERANCE, SAMPLED_TOLERANCE = 1e-3, 5e-3
#: The same in half precision: rounding to 8 bits of mantissa moves a loss by less than a hundredth.
HALF_LOSS_TOLERANCE, HALF_SAMPLED_TOLERANCE = 1e-2, 5e-2
#: Largest relative difference between a baseline's loss and ours before any update, and between entropies in
#: PPO, where a baseline samples its own answers. Our engines sample the same answers until the first update:
#: two of 32 answers that differed there changed the policies and with them all later answers.
FIRST_LOSS_TOLERANCE, ENTROPY_TOLERANCE = 1e-3, 5e-2
#: A baseline's loss must fall by between 1 / MAX_FALL_RATIO and MAX_FALL_RATIO times as much as ours: it
#: orders the rows in its own way, and mlx-lm trains only the blocks of a model.
MAX_FALL_RATIO = 2.0
#: PPO: largest first KL from the reference in nats per answer, and largest distance between mean scores in
#: standard errors.
MAX_FIRST_KL, MAX_SCORE_ERRORS = 1e-2, 4.0


@dataclass
class Timing:
    """Seconds, losses and memory of one engine or baseline at one kind of work, without warm-ups.

    seconds: of each unit, with its ``passes``, whose rows, tokens and steps are counted together; losses: of
    the last pass of each. against: the engine it is compared with, None where there is none. first: values
    before the first update. In training that is, for our engines, ``rows``: the summed negative
    log-likelihood and number of trained tokens of every row, and ``start``, the loss where that is another;
    for a baseline the ``rows`` of its first batch, their trained ``tokens`` and their ``loss`` per token. On
    rollouts it is ``kl``, ``score`` and, for our engines, ``score_std`` and ``entropy``.
    """

    engine: str
    what: str
    against: str | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: float = 0.0
    tokens: float = 0.0
    steps: int | None = None  # optimizer steps of a unit
    passes: int = 1
    dtype: str = "float32"
    peak_gb: float = 0.0
    process_gb: float = 0.0
    planned_gb: float | None = None  # what `plan` predicts for peak_gb
    device: str = ""
    version: str = ""
    shapes: int | None = None
    first: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    # seconds over those of ``against``: median, smallest, largest
    ratio: tuple[float, float, float] | None = None
    # relative difference of losses: the largest of any unit, or for a baseline in training before any update
    disagreement: float | None = None
    fall: float | None = None  # how far a baseline's loss fell in training, over how far ours did
    mismatch: str | None = None  # why there is no ratio
    flops_share: float | None = None
    bandwidth_share: float | None = None


def compare(timings: Sequence[Timing]) -> None:
    """Fill in each timing's ratio to ``against``, or the reason why there is none.

    There is a ratio where both finished and did the same work.
    """
    for t in timings:
        if not all(map(math.isfinite, t.losses)):
            t.error, t.losses = "a loss was not finite, so nothing is compared", []
    finished = {t.engine: t for t in timings if t.error is None}
    for t in finished.values():
        if t.against is None:
            continue
        base = finished.get(t.against)
        if base is None:
            t.mismatch = f"{t.against} failed"
            continue
        t.disagreement = max(map(_relative_difference, t.losses, base.losses))
        t.mismatch = _baseline_mismatch(t, base) if t.version else _engine_mismatch(t, base)
        if t.mismatch is None:
            t.ratio = spread([a / b for a, b in zip(t.seconds, base.seconds, strict=True)])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest and largest value."""
    return statistics.median(values), min(values), max(values)


def _relative_difference(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-9)


def _engine_mismatch(t: Timing, base: Timing) -> str | None:
    """Why one of our engines did not do the same work as another; None where it did."""
    assert t.disagreement is not None
    whole = t.dtype == "float32"
    loss = LOSS_TOLERANCE if whole else HALF_LOSS_TOLERANCE
    sampled = SAMPLED_TOLERANCE if whole else HALF_SAMPLED_TOLERANCE
    if on_rollouts(t.what):
        difference = _relative_difference(t.first["entropy"], base.first["entropy"])
        return (
            f"entropies of the first rollout differ by {difference:.2%}"
            if difference > sampled
            else _rollout_mismatch(t, base)
        )
    allowed = sampled if t.what.startswith("generate") else loss
    return f"losses differ by {t.disagreement:.2%}" if t.disagreement > allowed else None


def _baseline_mismatch(t: Timing, base: Timing) -> str | None:
    if t.what == "generate":
        return _decoding_mismatch(t, base)
    return _rollout_mismatch(t, base) if on_rollouts(t.what) else _training_mismatch(t, base)


def _decoding_mismatch(t: Timing, base: Timing) -> str | None:
    if (t.rows, t.tokens) != (base.rows, base.tokens):
        return (
            f"it decoded {t.tokens:.0f} tokens of {t.rows:.0f} answers, ours {base.tokens:.0f} of "
            f"{base.rows:.0f}"
        )
    assert t.disagreement is not None
    different = t.disagreement > ENTROPY_TOLERANCE
    return f"log-likelihoods of the answers differ by {t.disagreement:.1%}" if different else None


def _training_mismatch(t: Timing, base: Timing) -> str | None:
    untrained, first = base.first["rows"], t.first
    nll, count = (sum(untrained[i][part] for i in first["rows"]) for part in (0, 1))
    if first["tokens"] != count:
        return f"its first batch trains {first['tokens']:.0f} tokens, ours {count:.0f} on the same rows"
    t.disagreement = _relative_difference(first["loss"], nll / count)
    if t.disagreement > FIRST_LOSS_TOLERANCE:
        return f"losses before training differ by {t.disagreement:.2%}"
    start = base.first.get("start", sum(row[0] for row in untrained) / sum(row[1] for row in untrained))
    t.fall = (start - t.losses[-1]) / (start - base.losses[-1])
    alike = 1 / MAX_FALL_RATIO <= t.fall <= MAX_FALL_RATIO
    return None if alike else f"its loss fell {t.fall:.2f} times as far as ours"


def _rollout_mismatch(t: Timing, base: Timing) -> str | None:
    for side in (t, base):
        if abs(side.first["kl"]) > MAX_FIRST_KL:
            return f"{side.engine}'s first KL from the reference is {side.first['kl']:.3f}, not 0"
    answers = base.rows / base.passes
    error = base.first["score_std"] * math.sqrt(2 / answers)
    if abs(t.first["score"] - base.first["score"]) > MAX_SCORE_ERRORS * error:
        return (
            f"mean scores of the first rollout differ: {t.first['score']:.3f} against "
            f"{base.first['score']:.3f} +- {error:.3f}"
        )
    assert t.disagreement is not None
    return f"entropies differ by {t.disagreement:.1%}" if t.disagreement > ENTROPY_TOLERANCE else None


#: Pairs of kinds of work: the cost of the first is given relative to the second.
RELATIVE_TO = (
    ("kl", "sft"),
    ("kl-lora", "lora"),
    ("lora", "sft"),
    ("dpo", "sft"),
    ("dpo-lora", "lora"),
    ("generate-single", "generate"),
)


def relative_costs(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Time and memory of one kind of work relative to another, for each of our engines that did both.

    Pairs are left out where an engine's losses disagree with another engine's, or where answers decoded in
    two ways are not equally likely. The kinds were not timed in turns: the smallest and largest ``time`` are
    the extremes over all units, so that they include the effect of a busy machine.
    """
    done = {
        (t.what, t.engine): t
        for t in timings
        if t.error is None and not t.version and (t.disagreement is None or t.ratio)
    }
    costs = []
    for (what, engine), t in done.items():
        for base in (done.get((other, engine)) for kind, other in RELATIVE_TO if kind == what):
            if base is None:
                continue
            if what.startswith("generate"):
                difference = max(map(_relative_difference, t.losses, base.losses))
                if difference > SAMPLED_TOLERANCE:
                    continue
            median = statistics.median(t.seconds) / statistics.median(base.seconds)
            time = (median, min(t.seconds) / max(base.seconds), max(t.seconds) / min(base.seconds))
            costs.append(
                {
                    "engine": engine,
                    "what": what,
                    "over": base.what,
                    "time": time,
                    "memory": t.peak_gb / base.peak_gb,
                }
            )
    return costs
