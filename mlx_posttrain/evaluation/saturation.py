"""Headroom of bounded scores: how much the base leaves to gain, and how much of it each run gained.

A score shows nothing about training where the base is at its ceiling already. Examples are shares of right
answers, diversity, and distinct n-grams per token, whose ceiling lies below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import MIN_ROWS, Comparison
from mlx_posttrain.evaluation.findings import Finding, Verdict
from mlx_posttrain.evaluation.metric_table import METRICS
from mlx_posttrain.evaluation.metrics import Interval, bootstrap, paired_bootstrap, proportion

SATURATED = 0.9  # share of its ceiling from which on a score counts as saturated
NGRAM = 4
DISTINCT_PER_TOKEN = "distinct 4-grams per token"
BOUNDED_BY_1 = (
    "accuracy",
    "accuracy_phrasing",
    "accuracy_sampled",
    "pass_at_4",
    "pass_at_16",
    "distinct_2",
    "distinct_2_sampled",
    "diversity",
    "diversity_sampled",
)


@dataclass
class Headroom:
    """A score for which higher is better: its ceiling, the base's value, and each run's value and gain.

    ``gained`` is the share of the base's distance from the ceiling that a run gained, with the paired
    interval of the difference: 1 is the ceiling, below 0 a loss. It is empty where the base is at the
    ceiling.
    """

    ceiling: float
    base: Interval
    rows: int
    runs: dict[str, Interval] = field(default_factory=dict)
    gained: dict[str, Interval] = field(default_factory=dict)

    @property
    def saturated(self) -> bool:
        """Whether the base has at least SATURATED of the ceiling."""
        return self.base.mean >= SATURATED * self.ceiling


def distinct_per_token(seq_rep: np.ndarray, tokens: int, n: int = NGRAM) -> np.ndarray:
    """Distinct n-grams per token of continuations, [R]: (1 - seq_rep) * (T - n + 1) / T.

    seq_rep: their seq-rep-n, [R]; tokens: T, the length of every continuation. The ceiling is (T - n + 1) /
    T, that of text in which no n-gram occurs twice. It is below 1, because T tokens have T - n + 1 n-grams:
    .80 for T = 15 and n = 4. Source: Li et al. 2016, whose distinct-n divides by tokens too.
    """
    return (1.0 - seq_rep) * (tokens - n + 1) / tokens


def headroom(
    ceiling: float,
    base: np.ndarray,
    runs: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    is_proportion: bool = False,
) -> Headroom:
    """The headroom of one score.

    base, runs: [R] values row by row; is_proportion: whether intervals are those of metrics.proportion.
    """
    interval = proportion if is_proportion else bootstrap
    result = Headroom(ceiling, interval(base, seed=seed), int(np.isfinite(base).sum()))
    result.runs = {name: interval(rows, seed=seed) for name, rows in runs.items()}
    left = ceiling - result.base.mean
    if left > 1e-9:
        result.gained = {
            name: Interval(*(x / left for x in paired_bootstrap(rows, base, seed=seed)))
            for name, rows in runs.items()
        }
    return result


def measure_headroom(comparison: Comparison) -> dict[str, Headroom]:
    """Headroom of a comparison's bounded scores, by label.

    The base is the first model, and the runs are those that are compared with it.
    """
    base, *others = comparison.models
    by_label: dict[str, Headroom] = {}

    def add(
        metric: str,
        label: str,
        ceiling: float = 1.0,
        transform: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    ) -> None:
        if metric not in base.values:
            return
        base_rows = transform(base.values[metric].rows)
        runs = {
            m.name: transform(m.values[metric].rows)
            for m in others
            if metric in m.values and comparison.baseline(m) is base
        }
        runs = {
            name: rows
            for name, rows in runs.items()
            if rows.shape == base_rows.shape and np.isfinite(rows - base_rows).any()
        }
        by_label[label] = headroom(
            ceiling, base_rows, runs, seed=comparison.seed, is_proportion=METRICS[metric].is_proportion
        )

    for metric in BOUNDED_BY_1:
        add(metric, METRICS[metric].label)
    tokens = int(comparison.suite.get("continuation", 0))
    if tokens >= NGRAM:
        ceiling = float(distinct_per_token(np.zeros(1), tokens)[0])
        for metric, suffix in (("seq_rep_4", ""), ("seq_rep_4_sampled", ", sampled")):
            add(
                metric,
                f"{DISTINCT_PER_TOKEN}{suffix}",
                ceiling,
                lambda rows: distinct_per_token(rows, tokens),
            )
    return by_label


def check_saturation(comparison: Comparison) -> Finding | None:
    """Which scores were saturated at the base, and how much of the other scores' headroom runs gained.

    None where no bounded score was measured for the base and a run.
    """
    scores = {label: score for label, score in measure_headroom(comparison).items() if score.runs}
    if not scores:
        return None
    base = comparison.models[0].name
    saturated = [label for label, score in scores.items() if score.saturated and score.rows >= MIN_ROWS]
    nearest = min(scores, key=lambda label: scores[label].base.mean / scores[label].ceiling)
    # the sampled one where there is one
    per_token = [label for label in scores if label.startswith(DISTINCT_PER_TOKEN)][-1:]
    sentences = [
        _sentence(label, scores[label], base) for label in dict.fromkeys([*saturated, *per_token, nearest])
    ]
    drawn = {}
    if per_token:
        score = scores[per_token[0]]
        drawn["ceiling"] = charts.bars(
            {base: score.base, **score.runs},
            y=per_token[0],
            title="A score and its ceiling",
            ceiling=score.ceiling,
        )
        sentences.append(
            f"({DISTINCT_PER_TOKEN[0].upper()}{DISTINCT_PER_TOKEN[1:]} cannot reach 1, because T tokens have "
            "only T - 3 4-grams.)"
        )
    verdict: Verdict = (
        "yes"
        if saturated
        else "no"
        if any(score.rows >= MIN_ROWS for score in scores.values())
        else "cannot say"
    )
    stats = {
        label: {"ceiling": score.ceiling, "base": score.base, "runs": score.runs, "gained": score.gained}
        for label, score in scores.items()
    }
    return Finding("Was a score at its ceiling before training?", " ".join(sentences), verdict, stats, drawn)


def _sentence(label: str, score: Headroom, base: str) -> str:
    text = (
        f"{label[0].upper()}{label[1:]}: the ceiling is {score.ceiling:.3f}, and {base} has "
        f"{score.base.mean:.3f} ({score.base.mean / score.ceiling:.0%} of it)"
    )
    if not score.gained:
        return f"{text}, so there is nothing to gain."
    best = max(score.gained, key=lambda run: score.gained[run].mean)
    gain = score.gained[best]
    if gain.mean <= 0:
        return f"{text}; no run gained any of the rest."
    return f"{text}; of the rest {best} gained most, {gain.mean:.0%} [{gain.low:.0%}, {gain.high:.0%}]."
