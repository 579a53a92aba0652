"""A score at its ceiling before training shows nothing: such a score, and one with headroom."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.evaluation import saturation
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.evaluation.metrics import seq_rep_n

RNG = np.random.default_rng(0)


def comparison(tokens: int = 15, **models: dict[str, np.ndarray]) -> Comparison:
    made = [
        ModelResult(name, name, {k: Values(v) for k, v in values.items()}) for name, values in models.items()
    ]
    return Comparison({"continuation": tokens}, "question", made, [])


def test_the_ceiling_is_what_text_without_repetition_has():
    for tokens, ceiling in ((15, 0.80), (64, 61 / 64), (4, 0.25)):
        distinct = list(range(tokens))
        assert saturation.distinct_per_token(np.array([seq_rep_n(distinct)]), tokens)[0] == pytest.approx(
            ceiling
        )
    # by definition: distinct 4-grams over tokens
    text = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    grams = {tuple(text[i : i + 4]) for i in range(12)}
    assert saturation.distinct_per_token(np.array([seq_rep_n(text)]), 15)[0] == pytest.approx(len(grams) / 15)


def test_a_score_near_its_ceiling_at_the_base_is_saturated():
    """Of a ceiling of 0.80 the base has 0.788 and the best run 0.79: nothing is left to show."""
    base = np.full(40, 1 - 0.788 / 0.80) + RNG.normal(0, 0.002, 40)
    better = base - 0.002 / 0.80
    found = saturation.check_saturation(
        comparison(base={"seq_rep_4_sampled": base}, best={"seq_rep_4_sampled": better})
    )
    assert found is not None and found.verdict == "yes"
    (stats,) = found.stats.values()
    assert stats["ceiling"] == pytest.approx(0.80) and stats["base"].mean == pytest.approx(0.788, abs=0.002)
    assert stats["gained"]["best"].mean == pytest.approx(0.002 / 0.012, rel=0.1)
    assert "the ceiling is 0.800, and base has 0.788" in found.sentence and "cannot reach 1" in found.sentence
    assert set(found.charts) == {"ceiling"}


def test_a_score_with_headroom_is_not_saturated():
    base, better = (RNG.random(60) < 0.1).astype(float), (RNG.random(60) < 0.6).astype(float)
    found = saturation.check_saturation(
        comparison(base={"accuracy": base}, sft={"accuracy": better}, worse={"accuracy": np.zeros(60)})
    )
    assert found is not None and found.verdict == "no" and not found.charts
    headroom = saturation.measure_headroom(
        comparison(base={"accuracy": base}, sft={"accuracy": better}, worse={"accuracy": np.zeros(60)})
    )["right answers"]
    assert headroom.gained["sft"].mean == pytest.approx((better.mean() - base.mean()) / (1 - base.mean()))
    assert headroom.gained["worse"].mean < 0 and headroom.gained["sft"].low > 0
    assert "of the rest sft gained most" in found.sentence
    lost = saturation.check_saturation(comparison(base={"accuracy": better}, sft={"accuracy": base}))
    assert lost is not None and "no run gained any of the rest" in lost.sentence
    few = saturation.check_saturation(comparison(base={"accuracy": base[:5]}, sft={"accuracy": better[:5]}))
    assert few is not None and few.verdict == "cannot say"


def test_at_the_ceiling_nothing_can_be_gained():
    found = saturation.check_saturation(
        comparison(base={"diversity": np.ones(30)}, sft={"diversity": np.full(30, 0.5)})
    )
    assert found is not None and found.verdict == "yes" and "nothing to gain" in found.sentence
    assert saturation.check_saturation(comparison(base={"diversity": np.ones(30)})) is None  # no run
    # perplexity has no upper bound
    assert (
        saturation.check_saturation(
            comparison(base={"perplexity": np.ones(30)}, sft={"perplexity": np.ones(30)})
        )
        is None
    )
