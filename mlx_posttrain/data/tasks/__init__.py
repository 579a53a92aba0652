"""The embedded tasks: short questions with checkable answers, generated from word lists.

Splits: "train"; "valid", contents that no training row has, in the training phrasings; "phrasing", training
contents in phrasings that no training row has. The seed determines every row, on every platform; which
contents and phrasings are held out does not depend on the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

from mlx_posttrain import assets
from mlx_posttrain.data.tasks import on_lists, on_numbers, on_sentences, on_words, pairs, traces
from mlx_posttrain.data.tasks.checks import check
from mlx_posttrain.data.tasks.family import Row, rows, size
from mlx_posttrain.data.tasks.questions import question_answers

__all__ = [
    "FAMILIES",
    "REASONING_FAMILIES",
    "check",
    "load",
    "own_text",
    "preferences",
    "question_answers",
    "reasoning",
]

_TASKS = {
    one.name: one for module in (on_lists, on_words, on_numbers, on_sentences) for one in module.FAMILIES
}
_TRACES = {one.name: one for one in traces.FAMILIES}

FAMILIES: dict[str, str] = {name: one.about for name, one in _TASKS.items()}
REASONING_FAMILIES: dict[str, str] = {name: one.about for name, one in _TRACES.items()}


def own_text() -> list[dict[str, Any]]:
    """Return 640 texts that the embedded model wrote before any tuning: the nearest to its pre-training text.

    A mix of rows with them holds on to what the model knew (Robins 1995, "Catastrophic Forgetting, Rehearsal
    and Pseudorehearsal").
    """
    return assets.rows("own_text.jsonl")


def load(
    split: str = "train", limit: int | None = None, seed: int = 0, families: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Generate the task rows of a split, mixed evenly over families.

    Returns:
        Rows with instruction, input (may be empty), output, family, phrasing (its number) and checker (see
        ``check``). Without ``limit``, 6,000 rows for "train" and 600 for the others, or as many as exist;
        with it, the first ``limit`` rows of the same order.

    Raises:
        UserError: an unknown split or family, or a negative limit.
    """

    def row(one: Row) -> dict[str, Any]:
        instruction, given = one.family.text(one.item, one.phrasing)
        task = {"instruction": instruction, "input": given, "output": one.item.answer}
        return {**task, "family": one.family.name, "phrasing": one.phrasing, "checker": one.item.checker}

    return [row(one) for one in islice(rows(_TASKS, split, seed, families), size(split, limit))]


def preferences(
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    families: Sequence[str] | None = None,
    longer: bool = False,
) -> list[dict[str, Any]]:
    """Generate preference pairs over the same contents and phrasings as ``load``.

    longer: prefer the longer answer of each pair whatever it says, which plants a bias to be found.

    Returns:
        Rows with prompt, chosen, rejected, family, flaw (see ``pairs.FLAWS``) and checker; sizes as ``load``.

    Raises:
        UserError: an unknown split or family, or a negative limit.
    """
    rng = random.Random(f"{seed}/{split}/pairs")
    others = [one for name, one in _TASKS.items() if families is None or name in families]
    found = [
        pairs.pair(one, rng, others)
        for one in islice(rows(_TASKS, split, seed, families), size(split, limit))
    ]
    if longer:
        for row in found:
            row["chosen"], row["rejected"] = sorted((row["chosen"], row["rejected"]), key=len, reverse=True)
    return found


def reasoning(
    split: str = "train", limit: int | None = None, seed: int = 0, families: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Generate questions with a trace of true steps to the answer.

    Returns:
        Rows with question, thinking, answer, response (``<think>`` block, then the answer), checker, family
        and phrasing; sizes as ``load``.

    Raises:
        UserError: an unknown split or family, or a negative limit.
    """

    def row(one: Row) -> dict[str, Any]:
        instruction, given = one.family.text(one.item, one.phrasing)
        thinking, answer = one.item.thinking, one.item.answer
        return {
            "question": f"{instruction}\n{given}" if given else instruction,
            "thinking": thinking,
            "answer": answer,
            "response": f"<think>\n{thinking}\n</think>\n{answer}",
            "checker": one.item.checker,
            "family": one.family.name,
            "phrasing": one.phrasing,
        }

    return [row(one) for one in islice(rows(_TRACES, split, seed, families), size(split, limit))]
