"""What a reward model knows: held-out pairs judged by it, by the length of the answers, and by their words
alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.types import Preference
from mlx_posttrain.evaluate.metrics import Interval, correlation, paired_bootstrap, share

BINS = 5  # of calibration, between .5 and 1
# of the bag-of-words baseline; chosen once by cross-validation on training pairs, never on the rows that are
# judged
L2 = 10.0
WORDS = 20_000


@dataclass(frozen=True)
class PreferenceReport:
    """Shares are of pairs, between 0 and 1; ties count one half. See :func:`report`."""

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
    length_pearson: float
    length_spearman: float
    by_column: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        found = [
            f"held-out pairs: {self.pairs}; right {_percent(self.accuracy)}, loss {self.loss:.4f} (a coin: "
            f"{math.log(2):.4f})",
            f"  the longer answer wins: {_percent(self.longer)}; the model has {_gap(self.over_longer)}",
        ]
        if self.bag_of_words is not None and self.over_bag_of_words is not None:
            found.append(
                f"  bag of words: {_percent(self.bag_of_words)}; the model has {_gap(self.over_bag_of_words)}"
            )
        found.append(
            f"  score and length of an answer: Pearson {self.length_pearson:+.2f}, Spearman "
            f"{self.length_spearman:+.2f}"
        )
        shown = ", ".join(f"{said:.2f} said {was:.2f} right ({n})" for said, was, n in self.calibration)
        found.append(f"  calibration error {self.calibration_error:.3f}: {shown}")
        for column, shares in self.by_column.items():
            found.append(
                f"  right by {column}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            )
        top = max(self.counts, default=0) or 1
        found.append("  margins, chosen minus rejected:")
        for low, high, n in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True):
            found.append(f"  {low:+7.2f} to {high:+7.2f} {'█' * round(30 * n / top)} {n}")
        return found


def report(
    chosen: np.ndarray,
    rejected: np.ndarray,
    rows: Sequence[Preference],
    train: Sequence[Preference] | None = None,
    seed: int = 0,
) -> PreferenceReport:
    """Judge scores of P held-out pairs.

    chosen, rejected: [P] scores; rows: the pairs; train: the training pairs, for the bag-of-words baseline.
    Intervals are of 95 % (metrics.share, and paired_bootstrap for differences) over prompts: pairs of one
    prompt are drawn together. Calibration compares sigma(|margin|), how sure the model is, with the share of
    pairs it has right, in BINS equal bins from .5 to 1; its error is the mean gap, weighted by pairs (Guo et
    al. 2017). Margins beyond their 99 % quantile stand in the histogram's outer bars. A correlation with what
    does not vary is 0. Raises ValueError where there is no pair, a score is not finite, or scores and pairs
    differ in number.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if not len(rows) or not chosen.shape == rejected.shape == (len(rows),):
        raise ValueError(
            f"scores {chosen.shape} and {rejected.shape} of {len(rows)} pairs: there must be a score for "
            "each side of each pair"
        )
    if not np.all(np.isfinite(chosen)) or not np.all(np.isfinite(rejected)):
        raise ValueError("a score is not finite, so nothing can be said of the model")
    margins = chosen - rejected
    groups = _groups(rows)
    right = _wins(margins)
    lengths = np.array([[len(r.chosen), len(r.rejected)] for r in rows], np.float64)
    longer = _wins(lengths[:, 0] - lengths[:, 1])
    words = _wins(bag_of_words(train, rows)) if train else None
    sure = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    calibration = [
        (float(sure[place == b].mean()), float(right[place == b].mean()), int((place == b).sum()))
        for b in range(BINS)
        if (place == b).any()
    ]
    reach = max(1e-6, float(np.quantile(np.abs(margins), 0.99)))
    counts, edges = np.histogram(np.clip(margins, -reach, reach), bins=10, range=(-reach, reach))
    scores, sizes = np.concatenate([chosen, rejected]), np.concatenate([lengths[:, 0], lengths[:, 1]])

    def over(other: np.ndarray) -> Interval:
        a, weight = _by_group(right, groups)
        return paired_bootstrap(a, _by_group(other, groups)[0], weights=weight, seed=seed)

    def won(wins: np.ndarray) -> Interval:
        values, weight = _by_group(wins, groups)
        return share(values, weights=weight, seed=seed)

    return PreferenceReport(
        pairs=len(rows),
        accuracy=won(right),
        longer=won(longer),
        bag_of_words=None if words is None else won(words),
        over_longer=over(longer),
        over_bag_of_words=None if words is None else over(words),
        loss=float(np.mean(np.logaddexp(0.0, -margins))),
        edges=[float(e) for e in edges],
        counts=[int(c) for c in counts],
        calibration=calibration,
        calibration_error=float(sum(n * abs(said - was) for said, was, n in calibration) / len(rows)),
        length_pearson=correlation(scores, sizes),
        length_spearman=correlation(_ranks(scores), _ranks(sizes)),
        by_column=_by_column(right, rows),
    )


def length_controlled_wins(
    scores: np.ndarray, others: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray
) -> np.ndarray:
    """[R] values whose mean is the share of answers that would win against the others', were every two of one
    length.

    scores, others: the reward model's scores of two models' answers to the same prompts; lengths: tokens of
    those answers. A score of -inf is that of an answer without a word: it loses to any other whatever the
    lengths, and two such tie. A win is 1, a tie .5; a row where either score is nan is nan.

    On the rows where both said something the logistic model P(win) = sigma(a + b (difference in length, in
    root mean squares of it)) is fitted, and the rate there is g = sigma(a). Row i's value is g + g (1 - g) n
    [H^-1 x_i (win_i - P_i)]_0, with x_i = (1, difference), H the negative Hessian and n such rows: what the
    row adds to the rate, so that metrics.share draws an interval that knows b to be estimated as well
    (influence values: Hampel 1974; for a maximum of likelihood White 1982). All nan where equal lengths lie
    more than one standard deviation from the mean difference: what happens there would be the straight line's
    word alone, so the data cannot say. Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", eq. 2,
    without the terms for instructions, and linear in the difference: their tanh saturates where one model is
    mostly the longer.
    """
    scores, others = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    won = np.where(
        np.isnan(scores) | np.isnan(others),
        np.nan,
        np.where(scores > others, 1.0, np.where(scores == others, 0.5, 0.0)),
    )
    said = np.isfinite(scores) & np.isfinite(others)
    longer = (np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64))[said]
    if not said.any():
        return won
    if abs(longer.mean()) > longer.std():
        return np.full(len(won), np.nan)
    won[said] = _at_equal_length(won[said], longer)
    return won


def _at_equal_length(wins: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Influence values [n] around the rate of winning where ``longer`` is 0; see
    ``length_controlled_wins``.
    """
    if np.ptp(wins) == 0:
        # the rate is 0, .5 or 1 at every length, and no logistic model has a finite a for 0 and 1
        return wins
    size = float(np.sqrt((longer**2).mean())) or 1.0
    features = np.stack([np.ones(len(wins)), longer / size], 1)
    ridge, weights = np.diag([1e-6, 1e-2]), np.zeros(2)
    for _ in range(50):  # Newton; with two weights it is there in a few steps
        p = 1.0 / (1.0 + np.exp(-features @ weights))
        slope = features.T @ (wins - p) - ridge @ weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + ridge
        weights += np.clip(np.linalg.solve(curvature, slope), -2.0, 2.0)
        if np.abs(slope).max() < 1e-9:
            break
    # The ridge's pull is shared out among the rows, so that the values' mean is the rate exactly.
    pulls = features * (wins - p)[:, None] - ridge @ weights / len(wins)
    rate = float(1.0 / (1.0 + np.exp(-weights[0])))
    return rate + rate * (1 - rate) * len(wins) * np.linalg.solve(curvature, pulls.T)[0]


def bag_of_words(train: Sequence[Preference], rows: Sequence[Preference]) -> np.ndarray:
    """Margins [P] of a logistic regression on the words of the answers, blind to their order and to the
    prompt.

    Features are log(1 + count) of lower-case words and punctuation marks, chosen minus rejected; the words
    are those of at least two training answers, the most frequent WORDS of them. Without such a word every
    margin is 0. The weights minimise the summed loss plus L2/2 |w|^2, which has one minimum, so that the
    result depends on nothing but the rows.
    """
    documents = [[_words(r.chosen), _words(r.rejected)] for r in train]
    seen = Counter(word for pair in documents for side in pair for word in side)
    known = {
        word: i
        for i, (word, n) in enumerate(sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:WORDS])
        if n >= 2
    }
    weights = _logistic(*_sparse(documents, known), len(documents), len(known))
    row, column, value = _sparse([[_words(r.chosen), _words(r.rejected)] for r in rows], known)
    return np.bincount(row, value * weights[column], minlength=len(rows))


def _logistic(row: np.ndarray, column: np.ndarray, value: np.ndarray, pairs: int, words: int) -> np.ndarray:
    """Weights [words] that minimise sum log(1 + exp(-x.w)) + L2/2 |w|^2; x is the sparse [pairs, words]
    matrix of row, column, value.

    Newton's method, each step solved by conjugate gradients with the diagonal as preconditioner; it ends
    where no slope exceeds 1e-4.
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
    documents: Sequence[Sequence[Counter[str]]], known: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row, column, value = [], [], []
    for i, (chosen, rejected) in enumerate(documents):
        for word in chosen.keys() | rejected.keys():
            if word in known and chosen[word] != rejected[word]:
                row.append(i)
                column.append(known[word])
                value.append(math.log1p(chosen[word]) - math.log1p(rejected[word]))
    return np.array(row, int), np.array(column, int), np.array(value, float)


def _wins(margins: np.ndarray) -> np.ndarray:
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))


def _groups(rows: Sequence[Preference]) -> np.ndarray:
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(row.prompt, len(numbers)) for row in rows])


def _by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.bincount(groups).astype(np.float64)
    return np.bincount(groups, values) / size, size


def _by_column(right: np.ndarray, rows: Sequence[Preference]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for column in ("flaw", "family"):
        names = [row.extra.get(column) for row in rows]
        if all(isinstance(name, str) for name in names) and names:
            found[column] = {
                str(n): float(right[[m == n for m in names]].mean()) for n in sorted(set(map(str, names)))
            }
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _percent(interval: Interval) -> str:
    return f"{interval.mean:.1%} [{interval.low:.0%}, {interval.high:.0%}]"


def _gap(interval: Interval) -> str:
    return f"{interval.mean:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"
