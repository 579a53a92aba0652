"""One way of training against another over several seeds: paired differences of one metric.

Two kinds of chance are kept apart. Over rows (questions or texts): the same runs on others, by the paired
bootstrap. Over seeds: other runs of the same recipe, by Student's t over the seeds' differences, whose
interval is wide for three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field, field_validator

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import LEVEL, MIN_ROWS, Comparison
from mlx_posttrain.evaluation.findings import Finding, Verdict
from mlx_posttrain.evaluation.metric_table import METRICS, one_way_is_better
from mlx_posttrain.evaluation.metrics import (
    Interval,
    bootstrap,
    paired_bootstrap,
    sign_flip,
    student_quantile,
)


class Gain(config.Section):
    """What is to be shown as a gain: the first run of each pair against the second, a pair for each seed."""

    metric: str = Field("accuracy", description="the metric in which the first is to be better")
    pairs: list[tuple[str, str]] = Field(
        min_length=1,
        description="[first, second] by the names in `runs`; of a grid's runs by what comes before the part "
        "that both share, such as the seed; a run that is no grid's stands beside all runs of the other side",
    )
    family: str | None = Field(None, description="ask only the questions of one kind; null: all")

    _better = field_validator("metric")(one_way_is_better)

    def spread(self, runs: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs by names of runs, ``[a seed=0, b seed=0]`` and so on for ``[a, b]``.

        Raises ValueError for a name that is neither a run nor the beginning of two runs' names.
        """
        return [pair for first, second in self.pairs for pair in _spread(first, second, runs)]


def _spread(first: str, second: str, runs: Sequence[str]) -> list[tuple[str, str]]:
    if first in runs and second in runs:
        return [(first, second)]
    of_first, of_second = (_beginning(name, runs) for name in (first, second))
    if second in runs:
        return [(run, second) for run in of_first.values()]
    if first in runs:
        return [(first, run) for run in of_second.values()]
    found = [(of_first[rest], of_second[rest]) for rest in of_first if rest in of_second]
    if not found:
        raise ValueError(f"no run of {first!r} has one of {second!r} beside it with the same seed")
    return found


def _beginning(name: str, runs: Sequence[str]) -> dict[str, str]:
    """The runs whose name begins so, by the rest of it."""
    found = {run.removeprefix(f"{name} "): run for run in runs if run.startswith(f"{name} ")}
    if not found and name not in runs:
        raise ValueError(f"names {name!r}, which is none of the runs ({', '.join(runs)})")
    return found


def over_seeds(gains: Sequence[float]) -> Interval | None:
    """Mean of the seeds' gains and its 95 % interval by Student's t; None for fewer than two seeds.

    Source: Student 1908.
    """
    if len(gains) < 2:
        return None
    mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
    reach = student_quantile(1 - LEVEL / 2, len(gains) - 1) * error
    return Interval(mean, mean - reach, mean + reach)


def compare_pairs(
    name: str,
    comparison: Comparison,
    pairs: Sequence[Sequence[str]],
    metric: str = "accuracy",
    family: str | None = None,
) -> Finding | None:
    """Whether the first run of each pair is better in a metric than the second; one pair per seed.

    Yes or no where chance is rejected twice: by a sign-flip test over rows, each averaged over the seeds, and
    with several seeds by an interval over them that does not contain 0. Otherwise, and with fewer than
    MIN_ROWS rows, the verdict is "cannot say". Differences are the first minus the second, of a perplexity in
    nats per token. family: of the questions with unseen contents only those of this kind. None where the
    metric was not measured for a run, on other rows, or on none of the family.
    """
    found = {m.name: m.values[metric] for m in comparison.models if metric in m.values}
    names = [run for pair in pairs for run in pair]
    if any(run not in found for run in names) or len({found[run].rows.shape for run in names}) > 1:
        return None
    about, seed = METRICS[metric], comparison.seed
    kept = np.ones(len(found[names[0]].rows), bool)
    if family is not None:
        asked = [q["family"] for q in comparison.questions if q["rule"]["held_out"] == "content"]
        if len(asked) != len(kept) or family not in asked:
            return None
        kept = np.array([one == family for one in asked])
    rows = {run: found[run].rows[kept] for run in names}
    weights = found[names[0]].weights
    weights = None if weights is None else weights[kept]
    by_pair = {f"{a} - {b}": paired_bootstrap(rows[a], rows[b], weights=weights, seed=seed) for a, b in pairs}
    first, second = (np.mean([rows[pair[side]] for pair in pairs], axis=0) for side in (0, 1))
    pooled, seeds = (
        paired_bootstrap(first, second, weights=weights, seed=seed),
        over_seeds([difference.mean for difference in by_pair.values()]),
    )
    significant = sign_flip(first, second, weights=weights, seed=seed) <= LEVEL and (
        seeds is None or seeds.low > 0 or seeds.high < 0
    )
    better = (pooled.mean > 0) == (about.better == "higher")
    verdict: Verdict = "cannot say" if not significant or len(first) < MIN_ROWS else "yes" if better else "no"
    transform = about.transform or float
    means = [
        about.format.format(transform(bootstrap(side, weights=weights).mean)) for side in (first, second)
    ]
    sentence = (
        f"{about.label[0].upper()}{about.label[1:]} on {len(first)} rows, means of the runs: "
        f"{means[0]} against {means[1]}. "
        + ", ".join(f"{pair} {_amount(d, metric)}" for pair, d in by_pair.items())
    )
    if seeds:
        sentence += f". Over rows {_amount(pooled, metric)}; over {len(pairs)} seeds {_amount(seeds, metric)}"
    bars = {
        **{f"pair {number}": difference for number, difference in enumerate(by_pair.values(), 1)},
        "over rows": pooled,
    }
    unit = f"difference in {about.label}{', nats' if about.transform else ''}"
    chart = charts.bars({**bars, "over seeds": seeds} if seeds else bars, y=unit, title=name)
    stats = {"each": by_pair, "over_rows": pooled, "over_seeds": seeds}
    slug = "".join(c if c.isalnum() else "_" for c in name.lower())
    question = name if name.endswith("?") else f"Is it a gain: {name}?"
    return Finding(question, f"{sentence}.", verdict, stats, {f"gain_{slug}": chart})


def compare_all_pairs(comparison: Comparison, gains: Mapping[str, Gain]) -> list[Finding]:
    """One finding per name of ``gains``, whose pairs hold names of the comparison's models."""
    runs, findings = [m.name for m in comparison.models], []
    for name, gain in gains.items():
        finding = compare_pairs(name, comparison, gain.spread(runs), gain.metric, gain.family)
        if finding is None:
            of = f" of {gain.family}" if gain.family else ""
            log(f"{name} Not every one of its runs has {METRICS[gain.metric].label}{of}: left out")
        else:
            findings.append(finding)
    return findings


def _amount(d: Interval, metric: str) -> str:
    about = METRICS[metric]
    if about.is_proportion:
        return f"{d.mean:+.1%} [{d.low:+.0%}, {d.high:+.0%}]"
    unit = " nats" if about.transform else ""
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{unit}"
