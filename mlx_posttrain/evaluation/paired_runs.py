"""One way of training against another over several seeds: paired differences of right answers.

Two kinds of chance are kept apart. Over questions: the same runs on other questions, by the paired bootstrap.
Over seeds: other runs of the same recipe, by Student's t over the seeds' gains, whose interval is wide for
three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import LEVEL, MIN_ROWS, Comparison
from mlx_posttrain.evaluation.findings import Finding, Verdict
from mlx_posttrain.evaluation.metrics import Interval, paired_bootstrap, sign_flip, student_quantile


def over_seeds(gains: Sequence[float]) -> Interval | None:
    """Mean of the seeds' gains and its 95 % interval by Student's t; None for fewer than two seeds.

    Source: Student 1908.
    """
    if len(gains) < 2:
        return None
    mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    reach = student_quantile(1 - LEVEL / 2, len(gains) - 1) * error
    return Interval(mean, mean - reach, mean + reach)


def compare_pairs(name: str, comparison: Comparison, pairs: Sequence[Sequence[str]]) -> Finding | None:
    """Whether the first run of each pair answers more questions right than the second; one pair per seed.

    Yes or no where chance is rejected twice: by a sign-flip test over questions, each averaged over the
    seeds, and with several seeds by an interval over them that does not contain 0. Otherwise, and with fewer
    than MIN_ROWS questions, the verdict is "cannot say". None where right answers were not measured for a
    run.
    """
    rows = {m.name: m.values["accuracy"].rows for m in comparison.models if "accuracy" in m.values}
    if any(run not in rows for pair in pairs for run in pair):
        return None
    seed = comparison.seed
    by_pair = {f"{a} - {b}": paired_bootstrap(rows[a], rows[b], seed=seed) for a, b in pairs}
    first, second = (np.mean([rows[pair[side]] for pair in pairs], axis=0) for side in (0, 1))
    pooled, seeds = (
        paired_bootstrap(first, second, seed=seed),
        over_seeds([gain.mean for gain in by_pair.values()]),
    )
    significant = sign_flip(first, second, seed=seed) <= LEVEL and (
        seeds is None or seeds.low > 0 or seeds.high < 0
    )
    verdict: Verdict = (
        "cannot say" if not significant or len(first) < MIN_ROWS else "yes" if pooled.mean > 0 else "no"
    )
    sentence = f"Right answers on {len(first)} questions: " + ", ".join(
        f"{pair} {_points(gain)}" for pair, gain in by_pair.items()
    )
    if seeds:
        sentence += f". Over questions {_points(pooled)}; over {len(pairs)} seeds {_points(seeds)}"
    bars = {
        **{f"pair {number}": gain for number, gain in enumerate(by_pair.values(), 1)},
        "over questions": pooled,
    }
    chart = charts.bars(
        {**bars, "over seeds": seeds} if seeds else bars, y="gain in right answers", title=name
    )
    stats = {"each": by_pair, "over_questions": pooled, "over_seeds": seeds}
    slug = "".join(c if c.isalnum() else "_" for c in name.lower())
    return Finding(f"Is it a gain: {name}?", f"{sentence}.", verdict, stats, {f"gain_{slug}": chart})


def compare_all_pairs(comparison: Comparison, gains: Mapping[str, Sequence[Sequence[str]]]) -> list[Finding]:
    """One finding per name of ``gains``, whose pairs hold names of the comparison's models."""
    findings = (compare_pairs(name, comparison, pairs) for name, pairs in gains.items())
    return [finding for finding in findings if finding is not None]


def _points(d: Interval) -> str:
    return f"{d.mean:+.1%} [{d.low:+.0%}, {d.high:+.0%}]"
