"""Findings on preference optimisation, on made-up numbers, both ways."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.evaluation import findings
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values


def log(*sides: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations of better and worse answers' log-probabilities, among training steps."""
    records: list[dict[str, float]] = []
    for step, (chosen, rejected) in enumerate(sides):
        records += [{"step": step, "loss": 0.5}]
        records += [{"step": step, "eval/logps/chosen": chosen, "eval/logps/rejected": rejected}]
    return records


def comparison(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> Comparison:
    models = [
        ModelResult(name, name, {k: Values(v, np.ones(len(v))) for k, v in values.items()})
        for name, values in (("base", before), ("run", after))
    ]
    return Comparison({}, "question", models, [])


@pytest.mark.parametrize(
    ("last", "verdict", "words"),
    [
        ((-45.0, -62.0), "yes", "grew by +7.0 nats, better answers +5.0 and worse ones -2.0."),
        ((-58.0, -90.0), "no", "In run what was to be preferred became less likely"),
        ((-50.5, -70.0), "cannot say", "better answers -0.5 and worse ones -10.0."),
    ],
)
def test_where_the_margin_came_from(last, verdict, words):
    found = findings.margin_source({"run": log((-50.0, -60.0), (-40.0, -99.0), last), "sft": [{"step": 1}]})
    assert found.verdict == verdict and words in found.sentence
    assert list(found.stats) == ["run"]  # and of the first and the last evaluation
    assert found.stats["run"]["chosen"] == last[0] + 50
    assert found.stats["run"]["margin"] == last[0] + 50 - (last[1] + 60)
    assert len(found.charts["margin_source"].axes[0].lines) == 2


def test_one_run_that_displaces_is_enough_for_a_no():
    both = findings.margin_source({"a": log((-50, -50), (-45, -60)), "b": log((-50, -50), (-60, -90))})
    assert both.verdict == "no" and "In b what" in both.sentence
    assert findings.margin_source({"a": log((-50, -50)), "b": [{"step": 0, "eval/nll": 1.0}]}) is None


def test_better_or_only_longer():
    rows = np.arange(40)
    few, many = (rows < 10).astype(float), (rows < 30).astype(float)
    lengths = np.full(40, 8.0)
    logs = {"run": log((-50, -50), (-45, -60))}
    better = findings.better_or_longer(
        comparison({"accuracy": few, "length": lengths}, {"accuracy": many, "length": 2 * lengths}), logs
    )
    assert better.verdict == "yes" and better.stats["run"]["change"] == 20
    assert "25.0% before and 75.0% after, 8.0 and 16.0 tokens long." in better.sentence
    worse = findings.better_or_longer(comparison({"accuracy": many}, {"accuracy": few}), logs)
    assert worse.verdict == "no" and "tokens" not in worse.sentence
    # only longer: as many right answers, and twice the tokens
    longer = findings.better_or_longer(
        comparison({"accuracy": few, "length": lengths}, {"accuracy": few, "length": 2 * lengths}), logs
    )
    assert longer.verdict == "cannot say" and "16.0 tokens" in longer.sentence


def test_sampled_answers_count_where_there_are_any_and_few_questions_say_nothing():
    few, many = np.zeros(40), np.ones(40)
    logs = {"run": log((-50, -50), (-45, -60))}
    found = findings.better_or_longer(
        comparison({"accuracy": many, "accuracy_sampled": few}, {"accuracy": few, "accuracy_sampled": many}),
        logs,
    )
    assert found.verdict == "yes"
    short = findings.better_or_longer(comparison({"accuracy": few[:10]}, {"accuracy": many[:10]}), logs)
    assert short.verdict == "cannot say" and short.stats["run"]["p"] is None
    assert findings.better_or_longer(comparison({"accuracy": few}, {"accuracy": many}), {"run": []}) is None
