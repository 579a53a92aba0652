"""Metrics of tokens and rows as pure functions: repetition, perplexity, intervals and significance tests.

A row that has no value (a continuation too short for one n-gram, a row without a trained token) is nan, never
0 or 1, and every mean and interval leaves it out. Infinite values are errors, because they have no interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

# numbers drawn at a time by the bootstrap, so that its memory does not grow with the number of rows
CHUNK = 1_000_000
FLIPS = 10_000  # sign patterns drawn by sign_flip, which bound the smallest p-value


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


# repetition


def seq_rep_n(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of repeated n-grams in one continuation: 1 - unique / total.

    tokens: the T tokens of the continuation without its prompt. Returns nan where T < n, which means and
    intervals leave out. Range 0 (no n-gram occurs twice) to 1 - 1 / (T - n + 1) (one n-gram over and over), a
    ceiling below 1: compare continuations of one length. Raises ValueError for n < 1. Source: Welleck et al.
    2020, "Neural Text Generation with Unlikelihood Training", where human text has .006 at n = 4.
    """
    grams = _ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else math.nan


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Share of distinct n-grams among all n-grams of all sequences: unique / total.

    sequences: token lists; n-grams do not span sequences. Returns nan where all are shorter than n. Range
    1 / total to 1 (ceiling: no n-gram occurs twice). It falls as text grows, whatever the model: compare
    equal numbers of equally long sequences. Raises ValueError for n < 1. Source: Li et al. 2016, "A
    Diversity-Promoting Objective Function for Neural Conversation Models". They divide by the number of
    tokens; dividing by the number of n-grams, as has become usual, makes 1 the ceiling for every n.
    """
    grams = [gram for tokens in sequences for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def distinct_by_text(texts: Sequence[Sequence[Sequence[Hashable]]], n: int = 2) -> np.ndarray:
    """[R] values, one per text, whose mean is ``distinct_n`` of all texts, so that it has an interval.

    texts: the continuations of each of R texts, one or more. The values are jackknife pseudovalues: that of
    text r is the overall value plus R - 1 times the difference between the mean of all leave-one-out values
    and the one without r, which is low for a text that says what the others say. Drawing texts with
    replacement would not work, because a text drawn twice repeats itself whatever the model. The spread of
    the values is rather too wide than too narrow (Efron & Stein 1981, "The Jackknife Estimate of Variance").
    nan for a text without an n-gram, and for all texts where fewer than two have one. Raises ValueError for
    n < 1.
    """
    grams = [[gram for tokens in text for gram in _ngrams(tokens, n)] for text in texts]
    texts_with = Counter(gram for text in grams for gram in set(text))
    sizes = np.array([len(text) for text in grams], np.int64)
    kept = sizes > 0
    values = np.full(len(grams), np.nan)
    if kept.sum() < 2:
        return values
    only_here = np.array([sum(texts_with[gram] == 1 for gram in set(text)) for text in grams], np.int64)
    leave_one_out = ((len(texts_with) - only_here) / (sizes.sum() - sizes))[kept]
    values[kept] = len(texts_with) / sizes.sum() + (kept.sum() - 1) * (leave_one_out.mean() - leave_one_out)
    return values


def diversity(tokens: Sequence[Hashable]) -> float:
    """Product over n = 2, 3, 4 of 1 - seq-rep-n of one continuation.

    tokens: the T tokens of the continuation. Returns nan where T < 4. Range just above 0 (a loop) to 1
    (ceiling: nothing repeated). Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation".
    They count words and pool the n-grams of all texts before taking the product; here every continuation has
    a value, so that their mean has an interval.
    """
    return math.prod(1.0 - seq_rep_n(tokens, n) for n in (2, 3, 4))


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one token")
    tokens = list(tokens)
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


# likelihood


def perplexity(nll_sum: Any, tokens: Any) -> float:
    """Exponential of the mean negative log-likelihood per token.

    nll_sum: nats, a number or an array of parts; tokens: how many tokens they cover, a number or an array of
    the same parts. Range 1 (every token certain) upwards without a ceiling; a uniform guess over V tokens has
    V; inf where the exponential overflows. Every token counts once, whichever text it is in. Raises
    ValueError where there is no token. Source: Jelinek et al. 1977, "Perplexity - a measure of the difficulty
    of speech recognition tasks".
    """
    count = float(np.sum(tokens))
    if not count > 0:
        raise ValueError("perplexity needs at least one token")
    mean = float(np.sum(nll_sum)) / count
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


# association


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two [R] arrays, -1 to 1.

    It is 0, not nan, where an array is empty or constant, so that it can be written as JSON.
    """
    return float(np.corrcoef(a, b)[0, 1]) if len(a) and np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


# intervals


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """The probability that at least one of ``k`` answers is right, of each question: [R].

    right: [R, n] 1 or 0 for each sampled answer, n at least k; nan where a question has no rule. The unbiased
    estimate 1 - C(n - c, k) / C(n, k) with c right answers (Chen et al. 2021, "Evaluating Large Language
    Models Trained on Code", eq. 1), as a product, since the binomials are large. Raises ValueError for fewer
    answers than k.
    """
    n = right.shape[1]
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} answers to a question, got {n}")
    wrong = n - right.sum(1)
    missed = np.prod([np.clip(wrong - i, 0, None) / (n - i) for i in range(k)], axis=0)
    return 1.0 - missed


def bootstrap(
    values: Any,
    *,
    weights: Any = None,
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    transform: Callable[..., Any] | None = None,
) -> Interval:
    """Mean of the values and its bootstrap interval, studentised or, where that cannot be, BCa.

    values: [R], one per row; weights: [R], zero or more, for a weighted mean (nll / tokens weighted by tokens
    is the loss per token); transform: a monotone function applied to mean and bounds (``np.exp`` makes a loss
    a perplexity, whose interval is then that of the log scale). Rows are drawn with replacement, weight and
    value together, ``samples`` times. Rows whose value is nan or whose weight is 0 are left out.

    The interval is studentised (bootstrap-t): how many of its own standard errors a draw's mean lies from the
    mean. That takes the skew of values into account. Where so few rows differ that a draw may have no spread,
    and no standard error, it is Efron's BCa. The quantiles are those that give normal rows the width of
    Student's interval, which matters below about 40 rows. Measured coverage at .95: of 20 lognormal rows
    (sigma 1) .94, where percentiles have .85; of 20 normal rows .96; of 100 rows .94 and .95.

    The interval lies within the range of the values. A single value, or values that are all equal, give a
    point, because rows that do not differ say nothing about their spread (for a share of right answers use
    ``proportion``). Raises ValueError where no value is left, for infinite values, negative weights,
    samples < 1 or a level outside 0 to 1. Source: Efron 1987, "Better Bootstrap Confidence Intervals"; Efron
    & Tibshirani 1993, chapters 12 and 14; Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
    section 5.3, for the quantiles.
    """
    rows, weight = _valid_rows(values, weights)
    mean, means, errors = _resample(rows, weight, samples, seed, level)
    low, high = _bounds(rows, weight, means, errors, level) if np.ptp(rows) > 0 else (mean, mean)
    if transform:
        return Interval(*(float(transform(x)) for x in (mean, low, high)))
    return Interval(mean, low, high)


def _resample(
    rows: np.ndarray, weight: np.ndarray, samples: int, seed: int, level: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean, and of each draw the mean and the standard error, [samples] each; errors as ``bootstrap``."""
    if samples < 1 or not 0 < level < 1:
        raise ValueError(
            f"samples {samples}, level {level}: there must be at least one sample, and a level "
            "between 0 and 1"
        )
    if not len(rows):
        raise ValueError("there is no value to average")
    rng = np.random.default_rng(seed)
    means, errors = np.empty(samples), np.empty(samples)
    step = max(1, CHUNK // len(rows))
    for begin in range(0, samples, step):
        drawn = rng.integers(len(rows), size=(min(step, samples - begin), len(rows)))
        chunk = slice(begin, begin + step)
        means[chunk], errors[chunk] = _mean_and_error(rows[drawn], weight[drawn])
    mean, _ = _mean_and_error(rows, weight)
    return float(mean), means, errors


def _mean_and_error(rows: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean over the last axis, and its standard error as that of a ratio of two means."""
    total = weight.sum(-1)
    mean = (rows * weight).sum(-1) / total
    return mean, np.sqrt(((weight * (rows - mean[..., None])) ** 2).sum(-1)) / total


def _reach(level: float, count: int) -> float:
    """Half the width of Student's interval of ``count`` rows, in standard errors without Bessel's n - 1."""
    return student_quantile((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))


def _bounds(
    rows: np.ndarray, weight: np.ndarray, means: np.ndarray, errors: np.ndarray, level: float
) -> tuple[float, float]:
    """Bounds of ``bootstrap`` for two rows or more that are not all equal."""
    mean, error = _mean_and_error(rows, weight)
    normal, reach = NormalDist(), _reach(level, len(rows))
    if errors.min() > 1e-9 * np.ptp(rows):
        levels = [normal.cdf(reach), normal.cdf(-reach)]
        bounds = mean - error * np.quantile((means - mean) / errors, levels)
    else:
        # equal sums in another order differ in the last bits
        above = np.sign(np.round((means - mean) / np.ptp(rows), 12)).mean()
        edge = 1 / (len(means) + 1)
        bias = normal.inv_cdf(min(max(0.5 - 0.5 * float(above), edge), 1 - edge))
        pulls = weight * (rows - mean)
        acceleration = float((pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5))
        levels = [
            normal.cdf(bias + z / (1 - acceleration * z) if acceleration * z < 1 else math.copysign(9, z))
            for z in (bias - reach, bias + reach)
        ]
        bounds = np.quantile(means, levels)
    low, high = np.clip(bounds, rows.min(), rows.max())
    return float(low), float(high)


def proportion(
    values: Any, *, weights: Any = None, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of values that is a proportion, 0 to 1, and an interval within that range.

    The interval is not a point where no row or every row is right. values: [R], each 0 or 1, a mean of such
    values, or an influence value around their mean; weights, samples, seed, level, rows left out and errors
    as ``bootstrap``. Where every value is 0 or 1 and all weights are equal the bounds are Wilson's (1927, eq.
    5): with none right among R the upper one is about 4 / (R + 4). Otherwise rows are drawn as in
    ``bootstrap``, and the bounds are percentiles, as wide as there, on the scale of the log odds, linearised
    at the mean (Efron & Tibshirani 1993, section 13.7, on choosing the scale).
    """
    rows, weight = _valid_rows(values, weights)
    mean, means, _ = _resample(rows, weight, samples, seed, level)
    count = len(rows)
    if np.isin(rows, (0.0, 1.0)).all() and np.ptp(weight) == 0:
        z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
        middle = (mean * count + z2 / 2) / (count + z2)
        reach = math.sqrt(z2 * (mean * (1 - mean) * count + z2 / 4)) / (count + z2)
        return Interval(mean, min(mean, max(0.0, middle - reach)), max(mean, min(1.0, middle + reach)))
    if np.ptp(rows) == 0:
        return Interval(mean, mean, mean)
    outer = NormalDist().cdf(_reach(level, count))
    low, high = (float(bound) for bound in np.quantile(means, [1 - outer, outer]))
    if not 0 < mean < 1:
        return Interval(mean, low, high)

    def bound(value: float) -> float:
        shift = (mean - value) / (mean * (1.0 - mean))
        # beyond 500 the bound is 0 to all its digits
        return 1.0 / (1.0 + (1.0 - mean) / mean * math.exp(min(shift, 500.0)))

    return Interval(mean, bound(low), bound(high))


def _valid_rows(values: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of the rows that have both, as float64; errors as ``bootstrap``."""
    rows = np.asarray(values, np.float64)
    weight = np.ones(rows.shape) if weights is None else np.asarray(weights, np.float64)
    if rows.ndim != 1 or rows.shape != weight.shape:
        raise ValueError(f"values {rows.shape}, weights {weight.shape}: both must be one number per row")
    if not np.all(np.isfinite(weight)) or np.any(weight < 0):
        raise ValueError("weights must be finite, zero or more")
    kept = ~np.isnan(rows) & (weight > 0)
    if not np.all(np.isfinite(rows[kept])):
        raise ValueError("an infinite value has no interval")
    return rows[kept], weight[kept]


def paired_bootstrap(
    a: Any, b: Any, *, weights: Any = None, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of a - b over the same rows, and its interval.

    An interval without 0 is a difference at that level. a, b: [R], two models' values row by row; weights:
    [R], shared by both. Rows are drawn as pairs, so that what makes a row hard for both cancels, and the
    interval is far narrower than two separate ones would suggest. A row that is nan on either side is left
    out. Range: that of the values' differences; with 0/1 scores -1 to 1, and the ceiling of a - b is 1 -
    mean(b). Raises ValueError as ``bootstrap``, and where a and b differ in shape. Source: Efron & Tibshirani
    1993, chapter 13; Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    return bootstrap(_differences(a, b), weights=weights, samples=samples, seed=seed, level=level)


def _differences(a: Any, b: Any) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape}: a pair needs a value on both sides")
    if np.any(np.isinf(a)) or np.any(np.isinf(b)):
        # inf - inf would be nan, and nan rows are left out
        raise ValueError("an infinite value has no interval")
    return a - b


def jackknife(estimate: Any, leave_one_out: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) bounds, [...] each, around an estimate from P disjoint parts of the data.

    estimate: [...] one or several estimates from all parts; leave_one_out: [P, ...] the same without part p.
    The estimate must be a smooth function of means over parts. The interval is Student's with P - 1 degrees
    of freedom. Raises ValueError for fewer than two parts. Source: Tukey 1958, "Bias and Confidence in Not
    Quite Large Samples"; Efron & Tibshirani 1993, chapter 11.
    """
    values = np.asarray(leave_one_out, np.float64)
    parts = len(values)
    if parts < 2:
        raise ValueError(f"{parts} part: a jackknife leaves out one of several")
    error = np.sqrt(((values - values.mean(0)) ** 2).sum(0) * (parts - 1) / parts)
    reach = student_quantile((1 + level) / 2, parts - 1) * error
    return np.asarray(estimate) - reach, np.asarray(estimate) + reach


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with ``freedom`` degrees of freedom.

    It is exact for 1 and 2 and otherwise an approximation by the normal quantile, within 1 % from 7 on.
    Below that it is a little too large, which makes intervals wide. Source: Wallace 1959, "Bounds on Normal
    Approximations to Student's and the Chi-Square Distributions", solved for t.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.copysign(math.sqrt(freedom * math.expm1(z * z / freedom)), z)


# significance tests


def sign_flip(a: Any, b: Any, *, weights: Any = None, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip test of the differences a - b.

    The null hypothesis is that two models differ by chance alone: each row's a - b might as well have been b
    - a. a, b, weights: as ``paired_bootstrap``. The signs of the rows' differences are redrawn ``flips``
    times, and the p-value is the share of draws whose weighted sum is at least as far from 0 as the observed
    one. The observed one counts among them, so the p-value is at least 1 / (flips + 1). With 0/1 values this
    is McNemar's test, exact for any number of rows, where a bootstrap interval around two or three rows that
    differ is too narrow. 1 where no row differs or there is none. Raises ValueError as ``paired_bootstrap``.
    Source: Fisher 1935, "The Design of Experiments", section 21; Yeh 2000, "More accurate tests for the
    statistical significance of result differences".
    """
    differences, weight = _valid_rows(_differences(a, b), weights)
    parts = (differences * weight)[differences != 0]
    if not len(parts):
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(parts.sum()) * (1 - 1e-12)  # sums in another order differ in the last bits
    step = max(1, CHUNK // len(parts))
    beyond = 0
    for begin in range(0, flips, step):
        positive = rng.integers(0, 2, size=(min(step, flips - begin), len(parts)), dtype=np.int8)
        beyond += int((np.abs(2 * (positive @ parts) - parts.sum()) >= observed).sum())
    return (1 + beyond) / (1 + flips)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of K hypotheses are rejected when the family-wise error rate is at most ``level``.

    p_values: [K], which may depend on each other in any way. The smallest is compared with level / K, the
    next with level / (K - 1), and so on until one fails. Source: Holm 1979, "A Simple Sequentially Rejective
    Multiple Test Procedure".
    """
    rejected = [False] * len(p_values)
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[place] > level / (len(p_values) - rank):
            break
        rejected[place] = True
    return rejected
