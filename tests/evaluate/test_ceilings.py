"""A score that is full before training shows nothing: the origin's case in its own figures, and the other way
round.
"""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.evaluate import ceilings
from mlx_posttrain.evaluate.comparison import Comparison, Measured, Values
from mlx_posttrain.evaluate.metrics import seq_rep_n

RNG = np.random.default_rng(0)


def comparison(tokens: int = 15, **models: dict[str, np.ndarray]) -> Comparison:
    made = [
        Measured(name, name, {k: Values(v) for k, v in values.items()}) for name, values in models.items()
    ]
    return Comparison({"continuation": tokens}, "question", made, [])


def test_the_ceiling_is_what_text_without_repetition_has():
    for tokens, ceiling in ((15, 0.80), (64, 61 / 64), (4, 0.25)):
        distinct = list(range(tokens))
        assert ceilings.distinct_per_token(np.array([seq_rep_n(distinct)]), tokens)[0] == pytest.approx(
            ceiling
        )
    # By its definition: different 4-grams over tokens.
    text = [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    grams = {tuple(text[i : i + 4]) for i in range(12)}
    assert ceilings.distinct_per_token(np.array([seq_rep_n(text)]), 15)[0] == pytest.approx(len(grams) / 15)


def test_the_origins_score_was_full_at_its_base():
    """0.788, 0.79 and 0.80, as they were: nothing was left to be shown, whatever was made of it."""
    base = np.full(40, 1 - 0.788 / 0.80) + RNG.normal(0, 0.002, 40)
    better = base - 0.002 / 0.80
    found = ceilings.finding(comparison(base={"seq_rep_4_sampled": base}, best={"seq_rep_4_sampled": better}))
    assert found is not None and found.verdict == "yes"
    (figures,) = found.figures.values()
    assert figures["ceiling"] == pytest.approx(0.80) and figures["base"].mean == pytest.approx(
        0.788, abs=0.002
    )
    assert figures["gained"]["best"].mean == pytest.approx(0.002 / 0.012, rel=0.1)
    assert "0.800 at most, base 0.788" in found.sentence and "formula was not published" in found.sentence
    assert set(found.charts) == {"ceiling"}


def test_a_score_with_room_is_not_full():
    base, better = (RNG.random(60) < 0.1).astype(float), (RNG.random(60) < 0.6).astype(float)
    found = ceilings.finding(
        comparison(base={"accuracy": base}, sft={"accuracy": better}, worse={"accuracy": np.zeros(60)})
    )
    assert found is not None and found.verdict == "no" and not found.charts
    room = ceilings.rooms(
        comparison(base={"accuracy": base}, sft={"accuracy": better}, worse={"accuracy": np.zeros(60)})
    )["right answers"]
    assert room.gained["sft"].mean == pytest.approx((better.mean() - base.mean()) / (1 - base.mean()))
    assert room.gained["worse"].mean < 0 and room.gained["sft"].low > 0
    assert "of what was left sft gained most" in found.sentence
    lost = ceilings.finding(comparison(base={"accuracy": better}, sft={"accuracy": base}))
    assert lost is not None and "no run gained any of what was left" in lost.sentence
    few = ceilings.finding(comparison(base={"accuracy": base[:5]}, sft={"accuracy": better[:5]}))
    assert few is not None and few.verdict == "cannot say"


def test_at_the_very_ceiling_nothing_can_be_gained():
    found = ceilings.finding(comparison(base={"diversity": np.ones(30)}, sft={"diversity": np.full(30, 0.5)}))
    assert found is not None and found.verdict == "yes" and "nothing to gain" in found.sentence
    assert ceilings.finding(comparison(base={"diversity": np.ones(30)})) is None  # no run
    # no ceiling
    assert (
        ceilings.finding(comparison(base={"perplexity": np.ones(30)}, sft={"perplexity": np.ones(30)}))
        is None
    )
