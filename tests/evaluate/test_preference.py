"""The report on a reward model: every figure by hand, and baselines that see only what they should."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlx_posttrain.data import formats, tasks
from mlx_posttrain.data.types import Preference, Turn
from mlx_posttrain.evaluate.preference import L2, bag_of_words, report


def row(prompt: str, chosen: str, rejected: str, **extra) -> Preference:
    return Preference((Turn("user", prompt),), chosen, rejected, extra=extra)


ROWS = [
    row("a", "long answer", "short", flaw="x"),
    row("b", "short", "long answer", flaw="x"),
    row("c", "same", "size", flaw="y"),
    row("d", "aa", "b", flaw="y"),
]
CHOSEN, REJECTED = np.array([3.0, 1.0, 0.0, -1.0]), np.array([1.0, 1.0, 1.0, -2.0])


def test_by_hand():
    found = report(CHOSEN, REJECTED, ROWS)
    assert found.accuracy.mean == pytest.approx(0.625)  # right, tie, wrong, right
    assert found.longer.mean == pytest.approx(0.625)  # right, wrong, tie, right
    assert found.over_longer.mean == pytest.approx(0.0)
    assert found.bag_of_words is None
    assert found.loss == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (2, 0, -1, 1)]))
    assert sum(found.counts) == 4
    assert found.by_column == {"flaw": {"x": 0.75, "y": 0.5}}
    # sigma(2)=.88, sigma(0)=.5, sigma(1)=.73 twice: bins of a tenth
    assert [(round(said, 2), was, n) for said, was, n in found.calibration] == [(0.5, 0.5, 1), (0.73, 0.5, 2), (0.88, 1.0, 1)]
    assert found.calibration_error == pytest.approx((2 * (0.7311 - 0.5) + (1 - 0.8808)) / 4, abs=1e-3)
    text = "\n".join(found.lines())
    assert "62.5%" in text and "0.6931" in text
    json.dumps(found.to_dict())


def test_correlation_with_length():
    rows = [row(str(i), "w" * (i + 2), "w" * (20 - i)) for i in range(9)]
    lengths = np.array([[len(r.chosen), len(r.rejected)] for r in rows], float)
    found = report(lengths[:, 0], lengths[:, 1], rows)
    assert found.length_pearson == pytest.approx(1.0) and found.length_spearman == pytest.approx(1.0)
    assert found.accuracy == found.longer
    squared = report(-(lengths[:, 0] ** 3), -(lengths[:, 1] ** 3), rows)
    assert squared.length_spearman == pytest.approx(-1.0) and squared.length_pearson > -0.99


def test_prompts_are_drawn_whole():
    """Ten copies of one pair say no more than one."""
    rng = np.random.default_rng(0)
    rows = [row(str(i), "x", "y") for i in range(30)]
    right = rng.random(30) < 0.7
    once = report(right * 2.0 - 1, np.zeros(30), rows)
    tenfold = report(np.repeat(right * 2.0 - 1, 10), np.zeros(300), [r for r in rows for _ in range(10)])
    assert tenfold.accuracy.mean == pytest.approx(once.accuracy.mean)
    assert tenfold.accuracy.high - tenfold.accuracy.low == pytest.approx(once.accuracy.high - once.accuracy.low, rel=0.25)


def test_bag_of_words_learns_a_word_and_no_noise():
    rng = np.random.default_rng(1)
    words = [f"w{i}" for i in range(50)]

    def answer() -> str:
        return " ".join(rng.choice(words, 8))

    planted = [row(str(i), answer() + " please", answer()) for i in range(300)]
    noise = [row(str(i), answer(), answer()) for i in range(600)]
    assert (bag_of_words(planted[:200], planted[200:]) > 0).mean() > 0.95
    assert 0.4 < (bag_of_words(noise[:300], noise[300:]) > 0).mean() < 0.6
    assert not bag_of_words([row("a", "only", "once")], planted[:3]).any()


def test_bag_of_words_is_the_regularised_optimum():
    """One word, n pairs of which k have it on the right side: the gradient of its one weight is zero."""
    rows = [row(str(i), "good", "") if i < 7 else row(str(i), "", "good") for i in range(10)]
    rows = [Preference(r.prompt, r.chosen, r.rejected) for r in rows]
    weight = float(bag_of_words(rows, [row("q", "good", "")])[0]) / math.log(2)
    x = math.log(2)

    def slope(w: float) -> float:
        return sum(-s * x / (1 + math.exp(s * x * w)) for s in [1] * 7 + [-1] * 3) / 10 + L2 * w / 10

    assert slope(weight) == pytest.approx(0.0, abs=1e-4)


def test_the_embedded_pairs_are_not_given_away():
    """What the reward model has to beat on our own pairs; the figures are the generator's promise."""
    train, valid = (
        [r for r in formats.parse_rows(tasks.preferences(split, limit), source="p")[0] if isinstance(r, Preference)]
        for split, limit in (("train", 3000), ("valid", 600))
    )
    found = report(np.zeros(len(valid)), np.zeros(len(valid)), valid, train)
    assert found.accuracy.mean == 0.5
    assert found.bag_of_words is not None and found.bag_of_words.mean < 0.8
    assert found.longer.mean < 0.65
