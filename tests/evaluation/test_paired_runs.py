"""Paired gains over seeds: by hand, and with each possible verdict."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import config, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import paired_runs
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values


def answers(*shares: float, rows: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        name: (rng.random(rows) < share).astype(float) for name, share in zip("abcdef", shares, strict=False)
    }


def comparison(values: dict[str, np.ndarray]) -> Comparison:
    return Comparison(
        {}, "own", [ModelResult(name, name, {"accuracy": Values(rows)}) for name, rows in values.items()], []
    )


def test_students_interval_by_hand():
    """Gains of 27.3, 20.0 and 18.0 points: mean 21.77, standard deviation 4.90, t for 2 degrees 4.303."""
    found = paired_runs.over_seeds([0.273, 0.200, 0.180])
    assert found is not None and found.mean == pytest.approx(0.21767, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((0.0960, 0.3393), abs=2e-4)
    assert paired_runs.over_seeds([0.2]) is None
    many = paired_runs.over_seeds([0.1, 0.2] * 20)
    assert many is not None and many.high - many.mean == pytest.approx(
        2.0227 * np.std([0.1, 0.2] * 20, ddof=1) / 40**0.5, rel=2e-3
    )
    two = paired_runs.over_seeds([0.1, 0.3])
    assert two is not None and two.high - two.mean == pytest.approx(12.706 * 0.1, rel=1e-4)


def test_over_questions_pairs_rows():
    """Questions are averaged over seeds: 10 of 40 differ in both, and the others do not matter."""
    a, b = np.array([1.0, 1, 0, 1] * 10), np.array([1.0, 0, 0, 1] * 10)
    found = paired_runs.compare_pairs(
        "x", comparison({"a": a, "b": b, "c": a, "d": b}), [("a", "b"), ("c", "d")]
    )
    assert found is not None and found.stats["over_questions"].mean == pytest.approx(0.25)
    assert found.stats["each"]["a - b"] == found.stats["each"]["c - d"] == found.stats["over_questions"]
    assert 0.1 < found.stats["over_questions"].low < 0.25 < found.stats["over_questions"].high < 0.42


def test_a_gain_is_told_apart_from_none_and_from_a_loss():
    pairs = [("a", "b"), ("c", "d"), ("e", "f")]
    for shares, verdict in (
        ((0.8, 0.3, 0.82, 0.31, 0.79, 0.3), "yes"),
        ((0.3, 0.8, 0.31, 0.82, 0.3, 0.8), "no"),
        ((0.5,) * 6, "cannot say"),
        # one seed of three: a significant gain over questions, but not over seeds
        ((0.9, 0.1, 0.5, 0.5, 0.5, 0.5), "cannot say"),
    ):
        found = paired_runs.compare_pairs("x", comparison(answers(*shares)), pairs)
        assert found is not None and found.verdict == verdict, shares
        assert (
            len(found.stats["each"]) == 3
            and "over 3 seeds" in found.sentence
            and list(found.charts) == ["gain_x"]
        )
    one = paired_runs.compare_pairs("x", comparison(answers(0.8, 0.3)), pairs[:1])
    assert one is not None and one.verdict == "yes" and one.stats["over_seeds"] is None
    few = paired_runs.compare_pairs("x", comparison(answers(1.0, 0.0, rows=5)), pairs[:1])
    assert few is not None and few.verdict == "cannot say"
    assert (
        paired_runs.compare_all_pairs(comparison(answers(0.5)), {"x": [("a", "b")]}) == []
    )  # b was not measured


def test_unknown_runs_are_refused():
    raw = {"method": "report", "runs": {"a": "x"}, "gains": {"g": [["a", "b"]]}}
    with pytest.raises(UserError, match=r"not_asked names 'b'"):
        config.parse(
            {"method": "report", "runs": {"a": "x"}, "not_asked": ["b"]}, methods.get("report").Recipe, "test"
        )
    with pytest.raises(UserError, match=r"gains.g names 'b'"):
        methods.parse_recipe(raw, "test")
    with pytest.raises(UserError, match="no pair"):
        methods.parse_recipe({**raw, "gains": {"g": []}}, "test")
