"""The reward functions that a recipe can name without a file of its own; see rewards/functions.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_posttrain.data import tasks
from mlx_posttrain.rewards.verify import verify


def checker(
    prompts: list[str], completions: list[str], checker: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    """Return 1 where the row's checker (embedded tasks) accepts the answer, else 0; None without one."""
    specs = checker or [None] * len(completions)
    return [
        None if spec is None else float(tasks.check({"checker": spec}, text))
        for spec, text in zip(specs, completions, strict=True)
    ]


def exact_answer(
    prompts: list[str], completions: list[str], answer: Sequence[Any] | None = None, **columns: Any
) -> list[float | None]:
    """Return 1 where the completion's final answer is the row's ``answer``, as ``verify`` decides, else 0.

    The score is None where ``answer`` is missing or too long to be compared.
    """
    verdicts = (
        verify({"answer": reference}, text)
        for text, reference in zip(completions, answer or [None] * len(completions), strict=True)
    )
    return [None if right is None else float(right) for right in verdicts]
