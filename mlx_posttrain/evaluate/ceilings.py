"""How much room a bounded score has above the base, and how much of that room each run took.

A score shows nothing about training where the base is at its ceiling already. This project's origin reported
a "non-repetition score" of 0.79 as its best, where the base had 0.788 and no text could have more than 0.80.
Its formula was not published: ``distinct_per_token`` is the same kind of score and not the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.comparison import METRICS, MIN_ROWS, Comparison
from mlx_posttrain.evaluate.findings import Finding, Verdict
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, paired_bootstrap, share

# share of its ceiling from which on a score is called full; the origin's base had .788 / .80 = .985
FULL = 0.9
NGRAM = 4
LIKE_THE_ORIGINS = "different 4-grams a token"
BOUNDED_BY_1 = (
    "accuracy",
    "accuracy_phrasing",
    "accuracy_sampled",
    "distinct_2",
    "distinct_2_sampled",
    "diversity",
    "diversity_sampled",
)


@dataclass
class Room:
    """A score that is better the higher it is: its ceiling, what the base has, what each run has, and what it
    gained.

    ``gained`` is the share of what the base left to gain, with the paired interval of the difference: 1 is
    the ceiling, below 0 a loss. It is empty where the base left nothing.
    """

    ceiling: float
    base: Interval
    rows: int
    runs: dict[str, Interval] = field(default_factory=dict)
    gained: dict[str, Interval] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether the base has at least FULL of the ceiling."""
        return self.base.mean >= FULL * self.ceiling


def distinct_per_token(seq_rep: np.ndarray, tokens: int, n: int = NGRAM) -> np.ndarray:
    """Different n-grams per token of continuations, [R], from their seq-rep-n, [R]: (1 - seq_rep) * (T - n +
    1) / T.

    tokens: T, the length of every continuation. Ceiling (T - n + 1) / T, that of text in which nothing occurs
    twice: below 1, because T tokens have T - n + 1 n-grams; .80 for T = 15 and n = 4. Source: Li et al. 2016,
    whose distinct-n divides by tokens too.
    """
    return (1.0 - seq_rep) * (tokens - n + 1) / tokens


def room(
    ceiling: float, base: np.ndarray, runs: Mapping[str, np.ndarray], *, seed: int = 0, shares: bool = False
) -> Room:
    """The room of one score; base and runs: [R] values row by row; shares: whether they are shares
    (metrics.share).
    """
    interval = share if shares else bootstrap
    found = Room(ceiling, interval(base, seed=seed), int(np.isfinite(base).sum()))
    found.runs = {name: interval(rows, seed=seed) for name, rows in runs.items()}
    left = ceiling - found.base.mean
    if left > 1e-9:
        found.gained = {
            name: Interval(*(x / left for x in paired_bootstrap(rows, base, seed=seed)))
            for name, rows in runs.items()
        }
    return found


def rooms(comparison: Comparison) -> dict[str, Room]:
    """The bounded scores of a comparison by what they are called: of the first model, the base, and of those
    compared with it.
    """
    base, *others = comparison.models
    found: dict[str, Room] = {}

    def add(
        metric: str,
        label: str,
        ceiling: float = 1.0,
        of: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    ) -> None:
        if metric not in base.values:
            return
        own = of(base.values[metric].rows)
        runs = {
            m.name: of(m.values[metric].rows)
            for m in others
            if metric in m.values and comparison.baseline(m) is base
        }
        runs = {
            name: rows
            for name, rows in runs.items()
            if rows.shape == own.shape and np.isfinite(rows - own).any()
        }
        found[label] = room(ceiling, own, runs, seed=comparison.seed, shares=METRICS[metric].share)

    for metric in BOUNDED_BY_1:
        add(metric, METRICS[metric].label)
    tokens = int(comparison.suite.get("continuation", 0))
    if tokens >= NGRAM:
        ceiling = float(distinct_per_token(np.zeros(1), tokens)[0])
        for metric, how in (("seq_rep_4", ""), ("seq_rep_4_sampled", ", sampled")):
            add(metric, f"{LIKE_THE_ORIGINS}{how}", ceiling, lambda rows: distinct_per_token(rows, tokens))
    return found


def finding(comparison: Comparison) -> Finding | None:
    """Which scores were full at the base, and what the runs took of the room of the others; None where no
    bounded score was measured.
    """
    found = {name: one for name, one in rooms(comparison).items() if one.runs}
    if not found:
        return None
    base = comparison.models[0].name
    full = [name for name, one in found.items() if one.full and one.rows >= MIN_ROWS]
    widest = min(found, key=lambda name: found[name].base.mean / found[name].ceiling)
    # the sampled one where there is one
    like = [name for name in found if name.startswith(LIKE_THE_ORIGINS)][-1:]
    told = [_told(name, found[name], base) for name in dict.fromkeys([*full, *like, widest])]
    drawn = {}
    if like:
        one = found[like[0]]
        drawn["ceiling"] = charts.bars(
            {base: one.base, **one.runs}, y=like[0], title="A score and its ceiling", ceiling=one.ceiling
        )
        told.append(
            "(Different 4-grams a token are the kind of score that this project's origin reported, 0.788 "
            "for its base, 0.79 for its best and "
            "0.80 for text in which nothing occurs twice; its formula was not published.)"
        )
    verdict: Verdict = (
        "yes" if full else "no" if any(one.rows >= MIN_ROWS for one in found.values()) else "cannot say"
    )
    figures = {
        name: {"ceiling": one.ceiling, "base": one.base, "runs": one.runs, "gained": one.gained}
        for name, one in found.items()
    }
    return Finding("Was a score full before anything was trained?", " ".join(told), verdict, figures, drawn)


def _told(name: str, one: Room, base: str) -> str:
    text = (
        f"{name[0].upper()}{name[1:]}: {one.ceiling:.3f} at most, {base} {one.base.mean:.3f} "
        f"({one.base.mean / one.ceiling:.0%} of it)"
    )
    if not one.gained:
        return f"{text}, nothing to gain."
    best = max(one.gained, key=lambda run: one.gained[run].mean)
    gain = one.gained[best]
    if gain.mean <= 0:
        return f"{text}; no run gained any of what was left."
    return f"{text}; of what was left {best} gained most, {gain.mean:.0%} [{gain.low:.0%}, {gain.high:.0%}]."
