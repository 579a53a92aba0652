"""The reward functions that a recipe can name without a file of its own: what an answer says.

Parameters after the ``*`` are the ``args`` of a recipe, the others before it columns of the data. What an
answer looks like is judged in shape.py, code by python_tests.py; see functions.py for how they are called.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from mlx_posttrain.data import tasks
from mlx_posttrain.rewards import answers
from mlx_posttrain.rewards import ifeval as instructions
from mlx_posttrain.rewards.functions import Scores, rows
from mlx_posttrain.rewards.verify import arithmetic, countdown_game, verify

LONGEST_COMPARED = 4_000  # words of each text that are compared for their order


def checker(
    prompts: list[str], completions: list[str], checker: Sequence[Any] | None = None, **columns: Any
) -> Scores:
    """Return 1 where the row's checker (embedded tasks) accepts the answer, else 0; None without one."""
    specs = checker or [None] * len(completions)
    return [
        None if spec is None else float(tasks.check({"checker": spec}, text))
        for spec, text in zip(specs, completions, strict=True)
    ]


def exact_answer(
    prompts: list[str], completions: list[str], answer: Sequence[Any] | None = None, **columns: Any
) -> Scores:
    """Return 1 where the completion's final answer is the row's ``answer``, as ``verify`` decides, else 0.

    The score is None where ``answer`` is missing or too long to be compared.
    """
    verdicts = (
        verify({"answer": reference}, text)
        for text, reference in zip(completions, answer or [None] * len(completions), strict=True)
    )
    return [None if right is None else float(right) for right in verdicts]


def countdown(
    prompts: list[str],
    completions: list[str],
    target: Sequence[Any] | None = None,
    nums: Sequence[Any] | None = None,
    numbers: Sequence[Any] | None = None,
    *,
    partial: float = 0.0,
) -> Scores:
    """Return 1 where the final answer is arithmetic that uses each number exactly once and gives the target.

    An expression over the right numbers with another value earns ``partial``, anything else 0. The numbers
    are in the column ``nums``, or else ``numbers``; None where a row lacks them or the target. The expression
    is read by ``ast`` and worked out in fractions. Source: Pan et al. 2025, TinyZero, where ``partial`` is
    0.1.
    """
    found: Scores = []
    for text, row in zip(completions, rows(len(completions), target=target, nums=nums, numbers=numbers)):
        game = countdown_game(row.get("nums") or row.get("numbers"), row.get("target"))
        worked = arithmetic(answers.final_answer(text))
        if game is None:
            found.append(None)
        elif worked is None or worked.used != game[0]:
            found.append(0.0)
        else:
            found.append(1.0 if worked.gives(game[1]) else partial)
    return found


def ifeval(
    prompts: list[str],
    completions: list[str],
    instruction_id_list: Sequence[Any] | None = None,
    kwargs: Sequence[Any] | None = None,
    *,
    by: Literal["strict", "loose", "share"] = "strict",
) -> Scores:
    """Return whether the answer follows every instruction of an IFEval row: 1 or 0.

    With ``share`` it is the share of the instructions that it follows, strictly. Only the text after a
    thought counts. None for a row without instructions that can be judged. The rules are those of
    rewards/ifeval.py. Source: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models".
    """
    found: Scores = []
    each = rows(len(completions), prompt=prompts, instruction_id_list=instruction_id_list, kwargs=kwargs)
    for text, row in zip(completions, each):
        said = answers.after_thought(text)
        if not row.get("instruction_id_list"):
            found.append(None)
        elif by == "share":
            share = instructions.instruction_accuracy([row], [said])[1]
            found.append(None if math.isnan(share) else share)
        else:
            follows = (instructions.strict if by == "strict" else instructions.loose)(row, said)
            found.append(None if follows is None else float(follows))
    return found


def similarity(
    prompts: list[str],
    completions: list[str],
    reference_answer: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    *,
    metric: Literal["f1", "rouge_l", "recall"] = "f1",
) -> Scores:
    """Return how alike the answer and the row's own are, from 0 to 1, in words without case or punctuation.

    ``f1`` and ``rouge_l`` are 2 P R / (P + R). For ``f1`` precision P and recall R count the words in common
    (Rajpurkar et al. 2016, "SQuAD", without its removal of articles); for ``rouge_l`` the longest common
    subsequence (Lin 2004, with beta 1, of the first LONGEST_COMPARED words of each). ``recall`` is R of the
    words in common alone, which an answer can raise by saying more. Only the text after a thought counts. The
    reference is the column ``reference_answer``, or else ``answer``; None where it has no words.
    """
    found: Scores = []
    each = rows(len(completions), reference_answer=reference_answer, answer=answer)
    for text, row in zip(completions, each):
        reference = next((row[k] for k in ("reference_answer", "answer") if row.get(k) is not None), "")
        theirs = _words(str(reference))
        ours = _words(text)
        if not theirs:
            found.append(None)
            continue
        if metric == "rouge_l":
            ours, theirs = ours[:LONGEST_COMPARED], theirs[:LONGEST_COMPARED]
        common = (
            _subsequence(ours, theirs) if metric == "rouge_l" else (Counter(ours) & Counter(theirs)).total()
        )
        found.append(common / len(theirs) if metric == "recall" else 2 * common / (len(ours) + len(theirs)))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", answers.after_thought(text).casefold())


def _subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    # A row of the usual table as the bits of an integer: 0 where it steps up (Hyyrö 2004).
    places: dict[str, int] = {}
    for i, word in enumerate(theirs):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(theirs)) - 1
    row = every
    for word in ours:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(theirs) - row.bit_count()
