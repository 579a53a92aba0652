"""What one way of training is worth against another over several seeds: paired differences of right answers,
with intervals.

Two kinds of chance are told apart. Over questions: the same runs on other questions, by the paired bootstrap.
Over seeds: other runs of the same recipe, by Student's t over the seeds' gains, which three seeds make wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.comparison import LEVEL, MIN_ROWS, Comparison
from mlx_posttrain.evaluate.findings import Finding, Verdict
from mlx_posttrain.evaluate.metrics import Interval, paired_bootstrap, sign_flip, student_quantile


def over_seeds(gains: Sequence[float]) -> Interval | None:
    """Mean of the seeds' gains and its 95 % interval by Student's t; None for fewer than two seeds. Source:
    Student 1908.
    """
    if len(gains) < 2:
        return None
    mean, spread = float(np.mean(gains)), float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    reach = student_quantile(1 - LEVEL / 2, len(gains) - 1) * spread
    return Interval(mean, mean - reach, mean + reach)


def finding(name: str, comparison: Comparison, pairs: Sequence[Sequence[str]]) -> Finding | None:
    """Whether the first run of each pair, one pair a seed, answers more questions right than the second; None
    where that was not measured.

    Yes or no where a sign-flip test over questions, each with its mean over the seeds, and with several seeds
    the interval over them leave out 0; else, and below MIN_ROWS questions, the data cannot say.
    """
    rows = {m.name: m.values["accuracy"].rows for m in comparison.models if "accuracy" in m.values}
    if any(run not in rows for pair in pairs for run in pair):
        return None
    seed = comparison.seed
    each = {f"{a} - {b}": paired_bootstrap(rows[a], rows[b], seed=seed) for a, b in pairs}
    first, second = (np.mean([rows[pair[side]] for pair in pairs], axis=0) for side in (0, 1))
    pooled, seeds = (
        paired_bootstrap(first, second, seed=seed),
        over_seeds([gain.mean for gain in each.values()]),
    )
    sure = sign_flip(first, second, seed=seed) <= LEVEL and (seeds is None or seeds.low > 0 or seeds.high < 0)
    verdict: Verdict = (
        "cannot say" if not sure or len(first) < MIN_ROWS else "yes" if pooled.mean > 0 else "no"
    )
    told = f"Right answers on {len(first)} questions: " + ", ".join(
        f"{pair} {_points(gain)}" for pair, gain in each.items()
    )
    told += f". Over questions {_points(pooled)}; over {len(pairs)} seeds {_points(seeds)}" if seeds else ""
    bars = {
        **{f"pair {number}": gain for number, gain in enumerate(each.values(), 1)},
        "over questions": pooled,
    }
    drawn = charts.bars(
        {**bars, "over seeds": seeds} if seeds else bars, y="gain in right answers", title=name
    )
    figures = {"each": each, "over_questions": pooled, "over_seeds": seeds}
    slug = "".join(c if c.isalnum() else "_" for c in name.lower())
    return Finding(f"Is it a gain: {name}?", f"{told}.", verdict, figures, {f"gain_{slug}": drawn})


def findings(comparison: Comparison, gains: Mapping[str, Sequence[Sequence[str]]]) -> list[Finding]:
    """One finding for each name of ``gains``, whose pairs are (run, run), by the comparison's names."""
    made = (finding(name, comparison, pairs) for name, pairs in gains.items())
    return [one for one in made if one is not None]


def _points(d: Interval) -> str:
    return f"{d.mean:+.1%} [{d.low:+.0%}, {d.high:+.0%}]"
