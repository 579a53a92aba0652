"""Who is compared with whom, and whether they did the same work: a ratio of times is printed for nothing
else.

Our engines are compared with the first of them. A peer is compared with ours on the same library and device,
and must have begun alike and learnt alike: on its first batch, before any update, the same tokens count and
give the same loss, and over the units the loss falls about as far. PPO's first rollout is of weights that
nobody has changed: its divergence from the reference is 0, and the scorer, asked about other answers of the
same policy, gives the same mean score within its error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Largest difference, as a share, between losses of our engines, which compute the same: of training, and of
#: sampled answers, where one draw that falls on the other side of a boundary changes all that follows.
AGREE, AGREE_SAMPLED = 1e-3, 5e-3
#: The same for a peer: its loss before any update, and PPO's entropy, of answers that it draws itself. Our
#: engines draw alike until the first update: two of 32 answers that parted there made the policies, and with
#: them all later answers, others.
AGREE_FIRST, AGREE_ENTROPY = 1e-3, 5e-2
#: A peer's loss falls by at least one part in so many of what ours does, and by at most so many times that:
#: its order of rows is its own, and mlx-lm trains the blocks of a model only.
FALL = 2.0
#: PPO: the first divergence from the reference in nats per answer, and the distance of mean scores in
#: standard errors.
FIRST_KL, SCORE_ERRORS = 1e-2, 4.0


@dataclass
class Timing:
    """One engine at one kind of work: seconds and losses of its units, the warm-up left out, and what it
    used.

    against: the engine it is compared with, None where there is none. first: what was seen before the first
    update; of ours with ``rows``, the summed negative log-likelihood and number of trained tokens of every
    row, of a peer with the ``rows`` of its first batch, their trained ``tokens`` and ``loss``; of PPO ``kl``,
    ``score`` and, of ours, ``score_std`` and ``entropy``.
    """

    engine: str
    what: str
    against: str | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rows: float = 0.0
    tokens: float = 0.0
    steps: int | None = None  # optimizer steps of a unit
    peak_gb: float = 0.0
    process_gb: float = 0.0
    device: str = ""
    version: str = ""
    shapes: int | None = None
    first: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    # seconds over those of ``against``: median, least, most
    ratio: tuple[float, float, float] | None = None
    disagreement: float | None = (
        # relative difference of losses: the largest of a unit, of a peer in training the one before any
        # update
        None
    )
    fall: float | None = None  # how far a peer's loss fell in training, over how far ours did
    mismatch: str | None = None  # why there is no ratio
    flops_share: float | None = None
    bandwidth_share: float | None = None


def compare(timings: Sequence[Timing]) -> None:
    """Fill in ratios to ``against`` where both worked and did the same work, and elsewhere the reason why
    there is none.
    """
    for t in timings:
        if not all(map(math.isfinite, t.losses)):
            t.error, t.losses = "a loss was not finite: what diverges is not compared", []
    worked = {t.engine: t for t in timings if t.error is None}
    for t in worked.values():
        if t.against is None:
            continue
        base = worked.get(t.against)
        if base is None:
            t.mismatch = f"{t.against} failed"
            continue
        t.disagreement = max(map(_apart, t.losses, base.losses))
        t.mismatch = _peer(t, base) if t.version else _ours(t, base)
        if t.mismatch is None:
            t.ratio = spread([a / b for a, b in zip(t.seconds, base.seconds, strict=True)])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least, most."""
    return statistics.median(values), min(values), max(values)


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-9)


def _ours(t: Timing, base: Timing) -> str | None:
    assert t.disagreement is not None
    if t.what == "ppo":
        apart = _apart(t.first["entropy"], base.first["entropy"])
        return (
            f"entropies of the first rollout differ by {apart:.2%}"
            if apart > AGREE_SAMPLED
            else _same_rollout(t, base)
        )
    allowed = AGREE_SAMPLED if t.what.startswith("generate") else AGREE
    return f"losses differ by {t.disagreement:.2%}" if t.disagreement > allowed else None


def _peer(t: Timing, base: Timing) -> str | None:
    return _same_rollout(t, base) if t.what == "ppo" else _same_training(t, base)


def _same_training(t: Timing, base: Timing) -> str | None:
    known, first = base.first["rows"], t.first
    nll, count = (sum(known[i][part] for i in first["rows"]) for part in (0, 1))
    if first["tokens"] != count:
        return f"its first batch trains {first['tokens']:.0f} tokens, ours of the same rows {count:.0f}"
    t.disagreement = _apart(first["loss"], nll / count)
    if t.disagreement > AGREE_FIRST:
        return f"losses before training differ by {t.disagreement:.2%}"
    start = sum(row[0] for row in known) / sum(row[1] for row in known)
    t.fall = (start - t.losses[-1]) / (start - base.losses[-1])
    return None if 1 / FALL <= t.fall <= FALL else f"its loss fell {t.fall:.2f} times as far as ours"


def _same_rollout(t: Timing, base: Timing) -> str | None:
    for side in (t, base):
        if abs(side.first["kl"]) > FIRST_KL:
            return f"{side.engine}'s first divergence from the reference is {side.first['kl']:.3f}, not 0"
    error = base.first["score_std"] * math.sqrt(2 / base.rows)
    if abs(t.first["score"] - base.first["score"]) > SCORE_ERRORS * error:
        return (
            f"mean scores of the first rollout differ: {t.first['score']:.3f}, and "
            f"{base.first['score']:.3f} +- {error:.3f}"
        )
    assert t.disagreement is not None
    return f"entropies differ by {t.disagreement:.1%}" if t.disagreement > AGREE_ENTROPY else None


#: Kinds of work whose cost is told in terms of another's.
RELATIONS = (("kl", "sft"), ("kl-lora", "lora"), ("lora", "sft"), ("generate-single", "generate"))


def relations(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """What one kind of work takes over what another does, on each engine of ours that did both: ``time`` and
    ``memory``.

    Left out where an engine's losses disagree with another's, or where answers decoded in two ways are not
    equally likely. The kinds were not done in turns: least and most of ``time`` are the extremes of all
    units, so they tell what a busy machine may have done.
    """
    done = {
        (t.what, t.engine): t
        for t in timings
        if t.error is None and not t.version and (t.disagreement is None or t.ratio)
    }
    found = []
    for (what, engine), t in done.items():
        for base in (done.get((other, engine)) for kind, other in RELATIONS if kind == what):
            if base is None or (
                what.startswith("generate") and max(map(_apart, t.losses, base.losses)) > AGREE_SAMPLED
            ):
                continue
            middle = statistics.median(t.seconds) / statistics.median(base.seconds)
            time = (middle, min(t.seconds) / max(base.seconds), max(t.seconds) / min(base.seconds))
            found.append(
                {
                    "engine": engine,
                    "what": what,
                    "over": base.what,
                    "time": time,
                    "memory": t.peak_gb / base.peak_gb,
                }
            )
    return found
