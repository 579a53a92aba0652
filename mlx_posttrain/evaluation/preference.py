"""Evaluation of a reward model on held-out pairs, against baselines of answer length and of words alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.types import Labelled, Preference
from mlx_posttrain.evaluation.metrics import Interval, correlation, paired_bootstrap, proportion

BINS = 5  # of calibration, between .5 and 1
SIMULATIONS = 2000  # of pairs whose scores are perfectly calibrated
# Settings of the bag-of-words baseline, chosen once by cross-validation on training pairs and never on the
# rows that are evaluated.
L2 = 10.0
WORDS = 20_000


@dataclass(frozen=True)
class PreferenceStats:
    """Results of :func:`compare_with_baselines`; shares are of pairs, 0 to 1, and ties count one half."""

    pairs: int
    accuracy: Interval
    longer: Interval
    bag_of_words: Interval | None
    over_longer: Interval
    over_bag_of_words: Interval | None
    loss: float
    edges: list[float]
    counts: list[int]
    calibration: list[tuple[float, float, int]]
    calibration_error: float
    calibration_null: Interval
    length_pearson: float
    length_spearman: float
    by_column: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The results in words."""
        text = [
            f"held-out pairs: {self.pairs}; right {percent(self.accuracy)}, loss {self.loss:.4f} (chance: "
            f"{math.log(2):.4f})",
            f"  the longer answer wins: {percent(self.longer)}; the model has {signed(self.over_longer)}",
        ]
        if self.bag_of_words is not None and self.over_bag_of_words is not None:
            text.append(
                f"  bag of words: {percent(self.bag_of_words)}; the model has "
                f"{signed(self.over_bag_of_words)}"
            )
        text.append(
            f"  score and length of an answer: Pearson {self.length_pearson:+.2f}, Spearman "
            f"{self.length_spearman:+.2f}"
        )
        bins = ", ".join(f"{p:.2f} predicted {share:.2f} right ({n})" for p, share, n in self.calibration)
        null = self.calibration_null
        text.append(
            f"  calibration error {self.calibration_error:.3f}; perfectly calibrated scores of as many pairs "
            f"would have {null.mean:.3f} [{null.low:.3f}, {null.high:.3f}]"
        )
        text.append(f"  {bins}")
        for column, shares in self.by_column.items():
            text.append(
                f"  right by {column}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            )
        top = max(self.counts, default=0) or 1
        text.append("  margins, chosen minus rejected:")
        for low, high, n in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True):
            text.append(f"  {low:+7.2f} to {high:+7.2f} {'█' * round(30 * n / top)} {n}")
        return text


def compare_with_baselines(
    chosen: np.ndarray,
    rejected: np.ndarray,
    rows: Sequence[Preference],
    train: Sequence[Preference] | None = None,
    seed: int = 0,
) -> PreferenceStats:
    """Evaluate a reward model's scores of P held-out pairs, against length and a bag of words.

    chosen, rejected: [P] scores; rows: the pairs; train: the training pairs, for the bag-of-words baseline.
    Intervals are at 95 % (metrics.proportion, and paired_bootstrap for differences) over prompts: pairs of
    one prompt are drawn together. Calibration compares sigma(|margin|), the model's confidence, with the
    share of pairs it has right, in BINS equal bins from .5 to 1; its error is the mean gap, weighted by pairs
    (Guo et al. 2017). That is above 0 by chance alone: beside it stand mean and 95 % bounds for scores with
    the same margins that are perfectly calibrated, by simulation (Vaicenavicius et al. 2019). Margins beyond
    their 99 % quantile count in the histogram's outer bars. A correlation with a constant is 0. Raises
    ValueError where there is no pair, a score is not finite, or scores and pairs differ in number.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if not len(rows) or not chosen.shape == rejected.shape == (len(rows),):
        raise ValueError(
            f"scores {chosen.shape} and {rejected.shape} of {len(rows)} pairs: there must be a score for "
            "each side of each pair"
        )
    if not np.all(np.isfinite(chosen)) or not np.all(np.isfinite(rejected)):
        raise ValueError("a score is not finite, so the model cannot be evaluated")
    margins = chosen - rejected
    groups = prompt_numbers(rows)
    correct = _wins(margins)
    lengths = np.array([[len(r.chosen), len(r.rejected)] for r in rows], np.float64)
    longer = _wins(lengths[:, 0] - lengths[:, 1])
    words = _wins(bag_of_words(train, rows)) if train else None
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    calibration = [
        (float(confidence[place == b].mean()), float(correct[place == b].mean()), int((place == b).sum()))
        for b in range(BINS)
        if (place == b).any()
    ]
    limit = max(1e-6, float(np.quantile(np.abs(margins), 0.99)))
    counts, edges = np.histogram(np.clip(margins, -limit, limit), bins=10, range=(-limit, limit))
    scores, sizes = np.concatenate([chosen, rejected]), np.concatenate([lengths[:, 0], lengths[:, 1]])

    def difference_from(baseline: np.ndarray) -> Interval:
        a, weight = by_group(correct, groups)
        return paired_bootstrap(a, by_group(baseline, groups)[0], weights=weight, seed=seed)

    def win_rate(wins: np.ndarray) -> Interval:
        values, weight = by_group(wins, groups)
        return proportion(values, weights=weight, seed=seed)

    return PreferenceStats(
        pairs=len(rows),
        accuracy=win_rate(correct),
        longer=win_rate(longer),
        bag_of_words=None if words is None else win_rate(words),
        over_longer=difference_from(longer),
        over_bag_of_words=None if words is None else difference_from(words),
        loss=float(np.mean(np.logaddexp(0.0, -margins))),
        edges=[float(e) for e in edges],
        counts=[int(c) for c in counts],
        calibration=calibration,
        calibration_error=float(sum(n * abs(p - share) for p, share, n in calibration) / len(rows)),
        calibration_null=_calibration_null(confidence, place, seed),
        length_pearson=correlation(scores, sizes),
        length_spearman=correlation(_ranks(scores), _ranks(sizes)),
        by_column=_by_column(correct, rows),
    )


def _calibration_null(confidence: np.ndarray, place: np.ndarray, seed: int) -> Interval:
    """Mean and 95 % bounds of the calibration error of pairs that are right with their confidence.

    confidence, place: [P] confidences and numbers of their bins; a confidence of .5 is a tie, half right.
    """
    rng = np.random.default_rng([seed, 0xCA1B])
    errors = np.empty(SIMULATIONS)
    for i in range(SIMULATIONS):
        right = np.where(confidence == 0.5, 0.5, rng.random(len(confidence)) < confidence)
        errors[i] = np.abs(np.bincount(place, confidence - right)).sum() / len(confidence)
    return Interval(float(errors.mean()), *(float(q) for q in np.quantile(errors, [0.025, 0.975])))


def length_controlled_wins(
    scores: np.ndarray, others: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray
) -> np.ndarray:
    """[R] values whose mean is the share of answers that would win against the others' at equal length.

    scores, others: the reward model's scores of two models' answers to the same prompts; lengths: tokens of
    those answers. A score of -inf is that of an empty answer: it loses to any other whatever the lengths, and
    two such answers tie. A win is 1, a tie .5; a row where either score is nan is nan.

    The logistic model P(win) = sigma(a + b tanh(d / median |d|) + c d), d the difference in length, is fitted
    on the rows where neither answer is empty, and the rate at equal length is g = sigma(a). The effect of
    length may saturate, grow on, or both; where it saturates, a model with c alone can put the rate off by 5
    points. Row i's value is g + g (1 - g) n [H^-1 x_i (win_i - P_i)]_0, with x_i = (1, tanh, d), H the
    negative Hessian and n the number of such rows. That is the row's influence on the rate, so that the
    interval of metrics.proportion accounts for b and c being estimated too (influence values: Hampel 1974;
    for maximum likelihood: White 1982). All values are nan where a difference of 0 lies more than one
    standard deviation from the mean difference, because the rate there would be an extrapolation. Source:
    Dubois et al. 2024, "Length-Controlled AlpacaEval", eq. 2, without the terms for instructions; their tanh
    is of d over its standard deviation, which a few long answers make too wide, and they have no linear term.
    """
    scores, others = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    won = np.where(
        np.isnan(scores) | np.isnan(others),
        np.nan,
        np.where(scores > others, 1.0, np.where(scores == others, 0.5, 0.0)),
    )
    fitted = np.isfinite(scores) & np.isfinite(others)
    longer = (np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64))[fitted]
    if not fitted.any():
        return won
    if abs(longer.mean()) > longer.std():
        return np.full(len(won), np.nan)
    won[fitted] = _at_equal_length(won[fitted], longer)
    return won


def _at_equal_length(wins: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Influence values [n] around the win rate where ``longer`` is 0; see ``length_controlled_wins``."""
    if np.ptp(wins) == 0:
        # the rate is 0, .5 or 1 at every length, and for 0 and 1 no finite a fits
        return wins
    size = np.abs(longer[longer != 0]) if longer.any() else np.ones(1)
    saturated, linear = np.tanh(longer / np.median(size)), longer / np.sqrt((size**2).mean())
    features = np.stack([np.ones(len(wins)), saturated, linear], 1)
    ridge, weights = np.diag([1e-6, 1e-2, 1e-2]), np.zeros(3)
    for _ in range(50):  # Newton's method; with three weights it converges in a few steps
        p = 1.0 / (1.0 + np.exp(-features @ weights))
        slope = features.T @ (wins - p) - ridge @ weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + ridge
        weights += np.clip(np.linalg.solve(curvature, slope), -2.0, 2.0)
        if np.abs(slope).max() < 1e-9:
            break
    # The ridge term is divided among the rows, so that the mean of the values is exactly the rate.
    pulls = features * (wins - p)[:, None] - ridge @ weights / len(wins)
    rate = float(1.0 / (1.0 + np.exp(-weights[0])))
    return rate + rate * (1 - rate) * len(wins) * np.linalg.solve(curvature, pulls.T)[0]


def bag_of_words(train: Sequence[Preference], rows: Sequence[Preference]) -> np.ndarray:
    """Margins [P] of a logistic regression on the words of the answers, without their order or the prompt.

    Features are log(1 + count) of lower-case words and punctuation marks, chosen minus rejected. The words
    are the WORDS most frequent of those in at least two training answers; without such a word every margin is
    0. The weights minimise the summed loss plus L2/2 |w|^2, which has one minimum, so that the result depends
    only on the rows.
    """
    documents = [[_words(r.chosen), _words(r.rejected)] for r in train]
    counts = Counter(word for pair in documents for side in pair for word in side)
    vocabulary = {
        word: i
        for i, (word, n) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS])
        if n >= 2
    }
    weights = _logistic(*_sparse(documents, vocabulary), len(documents), len(vocabulary))
    row, column, value = _sparse([[_words(r.chosen), _words(r.rejected)] for r in rows], vocabulary)
    return np.bincount(row, value * weights[column], minlength=len(rows))


def _logistic(row: np.ndarray, column: np.ndarray, value: np.ndarray, pairs: int, words: int) -> np.ndarray:
    """Weights [words] that minimise sum log(1 + exp(-x.w)) + L2/2 |w|^2.

    x is the sparse [pairs, words] matrix of row, column and value. Newton's method, each step solved by
    conjugate gradients with the diagonal as preconditioner, stops where no component of the gradient exceeds
    1e-4.
    """

    def forward(w: np.ndarray) -> np.ndarray:
        return np.bincount(row, value * w[column], minlength=pairs)

    def backward(slopes: np.ndarray) -> np.ndarray:
        return np.bincount(column, value * slopes[row], minlength=words)

    weights = np.zeros(words)
    for _ in range(50):
        wrong = 1.0 / (1.0 + np.exp(np.clip(forward(weights), -50, 50)))
        residual = backward(wrong) - L2 * weights
        if np.abs(residual).max(initial=0.0) < 1e-4:
            break
        curvature = wrong * (1.0 - wrong)
        diagonal = L2 + np.bincount(column, value**2 * curvature[row], minlength=words)
        step, direction = np.zeros(words), residual / diagonal
        size = start = residual @ direction
        while size > 1e-8 * start:
            image = L2 * direction + backward(curvature * forward(direction))
            length = size / (direction @ image)
            step += length * direction
            residual = residual - length * image
            preconditioned = residual / diagonal
            size, before = residual @ preconditioned, size
            direction = preconditioned + size / before * direction
        weights += step
    return weights


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+|[^\w\s]", text.lower()))


def _sparse(
    documents: Sequence[Sequence[Counter[str]]], vocabulary: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, column, value = [], [], []
    for i, (chosen, rejected) in enumerate(documents):
        for word in chosen.keys() | rejected.keys():
            if word in vocabulary and chosen[word] != rejected[word]:
                row.append(i)
                column.append(vocabulary[word])
                value.append(math.log1p(chosen[word]) - math.log1p(rejected[word]))
    return np.array(row, int), np.array(column, int), np.array(value, float)


def _wins(margins: np.ndarray) -> np.ndarray:
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))


def prompt_numbers(rows: Sequence[Preference | Labelled]) -> np.ndarray:
    """[R] the number of each row's prompt."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(row.prompt, len(numbers)) for row in rows])


def by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the values of each group, and the group's size; groups: [R] numbers from 0."""
    size = np.bincount(groups).astype(np.float64)
    return np.bincount(groups, values) / size, size


def _by_column(correct: np.ndarray, rows: Sequence[Preference]) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for column in ("flaw", "family"):
        names = [row.extra.get(column) for row in rows]
        if all(isinstance(name, str) for name in names) and names:
            shares[column] = {
                str(n): float(correct[[m == n for m in names]].mean()) for n in sorted(set(map(str, names)))
            }
    return shares


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def percent(interval: Interval) -> str:
    """A share and its interval, for people."""
    return f"{interval.mean:.1%} [{interval.low:.0%}, {interval.high:.0%}]"


def signed(interval: Interval) -> str:
    """A difference of shares and its interval, for people."""
    return f"{interval.mean:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
