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


def test_rows_are_paired():
    """Questions are averaged over seeds: 10 of 40 differ in both, and the others do not matter."""
    a, b = np.array([1.0, 1, 0, 1] * 10), np.array([1.0, 0, 0, 1] * 10)
    found = paired_runs.compare_pairs(
        "x", comparison({"a": a, "b": b, "c": a, "d": b}), [("a", "b"), ("c", "d")]
    )
    assert found is not None and found.stats["over_rows"].mean == pytest.approx(0.25)
    assert found.stats["each"]["a - b"] == found.stats["each"]["c - d"] == found.stats["over_rows"]
    assert 0.1 < found.stats["over_rows"].low < 0.25 < found.stats["over_rows"].high < 0.42


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
    unmeasured = comparison(answers(0.5))
    unmeasured.models.append(ModelResult("b", "b"))
    assert paired_runs.compare_all_pairs(unmeasured, {"x": paired_runs.Gain(pairs=[("a", "b")])}) == []


def test_a_lower_perplexity_is_the_gain():
    """Losses of .5 less in every row of equal weight; of unequal weight the mean follows the weights."""
    loss = np.linspace(3.0, 5.0, 40)
    tokens = np.where(np.arange(40) < 20, 1.0, 3.0)
    lower = loss - np.where(np.arange(40) < 20, 0.1, 0.5)
    results = [
        ModelResult(name, name, {"perplexity": Values(rows, tokens)})
        for name, rows in (("a seed=0", lower), ("b seed=0", loss), ("a seed=1", lower), ("b seed=1", loss))
    ]
    gain = paired_runs.Gain(metric="perplexity", pairs=[("a", "b")])
    assert gain.spread([m.name for m in results]) == [("a seed=0", "b seed=0"), ("a seed=1", "b seed=1")]
    [found] = paired_runs.compare_all_pairs(Comparison({}, "own", results, []), {"Is less forgotten?": gain})
    assert found.question == "Is less forgotten?" and found.verdict == "yes"
    assert found.stats["over_rows"].mean == pytest.approx(-(20 * 0.1 + 60 * 0.5) / 80)
    assert "nats" in found.sentence
    back = paired_runs.Gain(metric="perplexity", pairs=[("b", "a")])
    assert paired_runs.compare_all_pairs(Comparison({}, "own", results, []), {"x": back})[0].verdict == "no"


def test_pairs_of_a_grid():
    runs = ["lr lr=1e-05 seed=0", "lr lr=1e-05 seed=1", "lr lr=0.1 seed=1", "one"]
    spread = paired_runs.Gain(pairs=[("lr lr=0.1", "lr lr=1e-05"), ("one", "lr lr=0.1 seed=1")]).spread(runs)
    assert spread == [("lr lr=0.1 seed=1", "lr lr=1e-05 seed=1"), ("one", "lr lr=0.1 seed=1")]
    against_one = paired_runs.Gain(pairs=[("lr lr=1e-05", "one")]).spread(runs)
    assert against_one == [("lr lr=1e-05 seed=0", "one"), ("lr lr=1e-05 seed=1", "one")]
    back = paired_runs.Gain(pairs=[("one", "lr lr=0.1")]).spread(runs)
    assert back == [("one", "lr lr=0.1 seed=1")]
    for pair, message in (
        (("lr lr=0.1", "kl"), "names 'kl'"),
        (("lr lr=1e-05 seed=0", "one x"), "names 'one x'"),
        (("lr lr=0.1 seed=1", "lr lr=0.2"), "names 'lr lr=0.2'"),
        (("a", "b"), "the same seed"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_runs.Gain(pairs=[pair]).spread([*runs, "a seed=0", "b seed=1"])


def test_a_gain_in_one_family(capsys):
    """30 questions of one kind are better by all, 30 of the other by none; phrasings do not count."""
    one = [{"family": "x", "rule": {"held_out": "content"}}, {"family": "y", "rule": {"held_out": "content"}}]
    questions = [*one * 30, {"family": "x", "rule": {"held_out": "phrasing"}}]
    better = np.array([1.0, 0.0] * 30)
    results = [
        ModelResult(name, name, {"accuracy": Values(rows)})
        for name, rows in (("a", better), ("b", np.zeros(60)))
    ]
    compared = Comparison({}, "own", results, questions)
    gains = {
        family or "all": paired_runs.Gain(pairs=[("a", "b")], family=family)
        for family in ("x", "y", "z", None)
    }
    found = paired_runs.compare_all_pairs(compared, gains)
    assert [f.verdict for f in found] == ["yes", "cannot say", "yes"]  # of z there is no question
    assert [f.stats["over_rows"].mean for f in found] == [1.0, 0.0, 0.5]
    assert "Not every one of its runs has right answers of z" in capsys.readouterr().err
    assert "on 30 rows, means of the runs: 100.0% against 0.0%" in found[0].sentence


def test_unknown_runs_are_refused():
    raw = {"method": "report", "runs": {"a": "x"}, "gains": {"g": {"pairs": [["a", "b"]]}}}
    with pytest.raises(UserError, match=r"not_asked names 'b'"):
        config.parse(
            {"method": "report", "runs": {"a": "x"}, "not_asked": ["b"]}, methods.get("report").Recipe, "test"
        )
    with pytest.raises(UserError, match=r"gains.g names 'b'"):
        methods.parse_recipe(raw, "test")
    with pytest.raises(UserError, match="at least 1"):
        methods.parse_recipe({**raw, "gains": {"g": {"pairs": []}}}, "test")
    with pytest.raises(UserError, match="'length' is no metric of which more or less is better"):
        methods.parse_recipe({**raw, "gains": {"g": {"pairs": [["a", "a"]], "metric": "length"}}}, "test")
