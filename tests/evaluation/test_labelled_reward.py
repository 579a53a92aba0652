"""Rewards of labelled answers held to their labels: numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.data.types import Labelled, Turn
from mlx_posttrain.evaluation.labelled_reward import area_under_curve, judge_labels


def row(question, answer, label):
    return Labelled((Turn("user", question),), answer, label)


def test_shares_worked_out_by_hand():
    rows = [row("a", "long", True), row("a", "no", False), row("b", "x", True), row("c", "ye", False)]
    train = [row("q", "abc", True)] * 3  # of 3 letters: "long" counts as good, all others as bad
    found = judge_labels(np.array([0.5, -1.0, -0.2, 0.0]), rows, train)
    # right: yes, yes, no, half; by length: yes, yes, no, yes
    assert found.accuracy.mean == pytest.approx(2.5 / 4) and found.longer.mean == pytest.approx(3 / 4)
    assert found.over_longer.mean == pytest.approx(-0.5 / 4)
    # good .5 and -.2 against bad -1 and 0: .5 beats both, -.2 beats one
    assert found.auc == pytest.approx(3 / 4) and (found.answers, found.good) == (4, 2)
    # lengths 4 and 1 against 2 and 2
    assert found.longer_auc == pytest.approx(1 / 2)
    text = "\n".join(found.lines())
    assert "the reward's sign is right 62.5%" in text and "75.0% of the time (AUC)" in text


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    values, good = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[good] for b in values[~good]]
    assert area_under_curve(values, good) == pytest.approx(np.mean(pairs))
    assert area_under_curve(values, np.ones(60, bool)) is None


def test_one_label_has_no_curve():
    rows = [row("a", "yes", True), row("b", "no", True)]
    found = judge_labels(np.array([1.0, -1.0]), rows, rows)
    assert found.auc is None and found.accuracy.mean == 0.5 and "AUC" not in "\n".join(found.lines())
    with pytest.raises(ValueError, match="not finite"):
        judge_labels(np.array([1.0, np.nan]), rows, rows)
