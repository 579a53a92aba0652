"""Which answers are right, by the rule of each question's row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_posttrain.data.types import Conversation
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.rewards import verify


def add_accuracy(result: ModelResult, questions: Sequence[Conversation]) -> None:
    """Fill in the accuracy of a model's answers, one to each question, on unseen contents and phrasings."""
    correct = check_answers(questions, result.answers)
    held_out = np.array([q.extra["held_out"] for q in questions])
    for metric, kind in (("accuracy", "content"), ("accuracy_phrasing", "phrasing")):
        if np.isfinite(correct[held_out == kind]).any():
            result.values[metric] = Values(correct[held_out == kind])


def check_answers(questions: Sequence[Conversation], answers: Sequence[str]) -> np.ndarray:
    """1 for each answer that its row's rule accepts, 0 for each other: [R] float64.

    nan for a row without a rule.
    """
    return _check([q.extra for q in questions], answers)


def check_greedy_answers(comparison: Comparison) -> dict[str, np.ndarray]:
    """``check_answers`` of each model's greedy answers, by the model's name: [questions] float64."""
    rules = [q["rule"] for q in comparison.questions]
    return {m.name: _check(rules, m.answers) for m in comparison.models}


def _check(rules: Sequence[dict[str, Any]], answers: Sequence[str]) -> np.ndarray:
    verdicts = [verify.verify(rule, text) for rule, text in zip(rules, answers, strict=True)]
    return np.array([np.nan if v is None else float(v) for v in verdicts])
