"""What is counted on tokens and rows, as pure functions: repetition, diversity, perplexity, and intervals by the bootstrap.

A row that has no value (a continuation too short for one n-gram, a row without a trained token) is nan, never 0 or 1, and every mean and
interval leaves it out. Infinite values are errors: no interval could be drawn around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

CHUNK = 1_000_000  # numbers drawn at a time by the bootstrap, so that its memory does not grow with the rows


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


# -- repetition ----------------------------------------------------------------------------------------------------------------------


def seq_rep_n(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of repeated n-grams in one continuation: 1 - unique / total.

    tokens: the T tokens of the continuation without its prompt. Returns nan where T < n, which means and intervals leave out.
    Range 0 (no n-gram occurs twice) to 1 - 1 / (T - n + 1) (one n-gram over and over), a ceiling below 1: compare continuations of one
    length. Raises ValueError for n < 1.
    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", where human text has .006 at n = 4.
    """
    grams = _ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else math.nan


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share of different n-grams among all n-grams of all sequences: unique / total.

    sequences: token lists; an n-gram never reaches from one into the next. Returns nan where all are shorter than n.
    Range 1 / total to 1 (ceiling: every n-gram new). It falls as text grows, whatever the model: compare equal numbers of equally long
    sequences. Raises ValueError for n < 1.
    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", which divides by the number
    of tokens; dividing by the number of n-grams, as is usual since, makes 1 the ceiling for every n.
    """
    grams = [gram for tokens in sequences for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def diversity(tokens: Sequence[Hashable]) -> float:
    """Product over n = 2, 3, 4 of 1 - seq-rep-n of one continuation.

    tokens: the T tokens of the continuation. Returns nan where T < 4. Range just above 0 (a loop) to 1 (ceiling: nothing repeated).
    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation". Their figures count words and pool the
    n-grams of all texts before the product; this one has a value per continuation, so that intervals can be had.
    """
    return math.prod(1.0 - seq_rep_n(tokens, n) for n in (2, 3, 4))


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one token")
    tokens = list(tokens)
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


# -- likelihood ----------------------------------------------------------------------------------------------------------------------


def perplexity(nll_sum: Any, tokens: Any) -> float:
    """exp of the mean negative log-likelihood per token.

    nll_sum: nats, a number or an array of parts; tokens: how many tokens they cover, a number or an array of the same parts.
    Range 1 (every token certain) upwards without a ceiling; a uniform guess over V tokens has V; inf where the exponential overflows.
    Every token counts once, whichever text it stands in. Raises ValueError where there is no token.
    Source: Jelinek et al. 1977, "Perplexity - a measure of the difficulty of speech recognition tasks".
    """
    count = float(np.sum(tokens))
    if not count > 0:
        raise ValueError("perplexity needs at least one token")
    mean = float(np.sum(nll_sum)) / count
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


# -- association ---------------------------------------------------------------------------------------------------------------------


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two [R] arrays, -1 to 1; 0 where one of them does not vary or is empty, so that it can be written as JSON."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) and np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


# -- intervals -----------------------------------------------------------------------------------------------------------------------


def bootstrap(
    values: Any, *, weights: Any = None, samples: int = 2000, seed: int = 0, level: float = 0.95, of: Callable[..., Any] | None = None
) -> Interval:
    """Mean of the values and its percentile-bootstrap interval.

    values: [R], one per row; weights: [R], zero or more, for a weighted mean (nll / tokens weighted by tokens is the loss per token);
    of: a monotone function laid on mean and bounds (``np.exp`` makes a loss a perplexity). Rows are drawn with replacement, weight and
    value together, ``samples`` times. Rows whose value is nan or whose weight is 0 are left out.

    The interval lies within the values' own range. One value, or values all equal, give a point: rows that do not differ say nothing
    about their spread, so a score of 0 or 1 on every row is less certain than its interval. A rule of thumb (Hanley & Lippman-Hand
    1983): with R rows and none right, the true share may still be 3 / R. Below about 20 rows the interval is too narrow.
    Raises ValueError where no value is left, for infinite values, negative weights, samples < 1 or a level outside 0 to 1.
    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; Efron & Tibshirani 1993, chapter 13.
    """
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples {samples}, level {level}: there must be at least one sample, and a level between 0 and 1")
    rows = np.asarray(values, np.float64)
    weight = np.ones(rows.shape) if weights is None else np.asarray(weights, np.float64)
    if rows.ndim != 1 or rows.shape != weight.shape:
        raise ValueError(f"values {rows.shape}, weights {weight.shape}: both must be one number per row")
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
        raise ValueError("weights must be finite, zero or more")
    kept = ~np.isnan(rows) & (weight > 0)
    rows, weight = rows[kept], weight[kept]
    if not len(rows):
        raise ValueError("there is no value to average")
    if not np.all(np.isfinite(rows)):
        raise ValueError("an infinite value has no interval")
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, CHUNK // len(rows))
    for begin in range(0, samples, step):
        drawn = rng.integers(len(rows), size=(min(step, samples - begin), len(rows)))
        means[begin : begin + step] = np.average(rows[drawn], axis=1, weights=weight[drawn])
    mean = float(np.average(rows, weights=weight))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Sums of many equal numbers in another order differ in the last bit: a point stays a point.
    low, high = (mean, mean) if np.ptp(rows) == 0 else (float(low), float(high))
    return Interval(*(float(of(x)) for x in (mean, low, high))) if of else Interval(mean, low, high)


def paired_bootstrap(a: Any, b: Any, *, weights: Any = None, samples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of a - b over the same rows and its interval; 0 outside the interval is a difference at that level.

    a, b: [R], two models' values row by row; weights: [R], shared by both. Rows are drawn as pairs, so what makes a row hard for both
    cancels, and the interval is far narrower than two separate ones would suggest. A row that is nan on either side is left out.
    Range: that of the values' differences; with 0/1 scores -1 to 1, and the ceiling of a - b is 1 - mean(b).
    Raises ValueError as ``bootstrap``, and where a and b differ in shape.
    Source: Efron & Tibshirani 1993, chapter 13; Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape}: a pair needs a value on both sides")
    if np.any(np.isinf(a)) or np.any(np.isinf(b)):
        raise ValueError("an infinite value has no interval")  # before inf - inf turns it into a nan that would be left out
    return bootstrap(a - b, weights=weights, samples=samples, seed=seed, level=level)
