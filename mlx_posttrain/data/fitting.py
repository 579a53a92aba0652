"""Answers to one prompt as examples that fit a length, whole: a dialogue may lose its oldest exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_posttrain.data.encode import encode_each
from mlx_posttrain.data.types import Conversation, Example, Turn


class Asked(NamedTuple):
    """One or more answers to a prompt; templated: as of a Conversation."""

    prompt: tuple[Turn, ...]
    answers: tuple[str, ...]
    templated: bool


def fit(
    rows: Sequence[Asked], tokenizer: object, template: str | Sequence[str], max_length: int
) -> list[tuple[tuple[Example, ...], int] | str | None]:
    """For each row its answers' examples, and how many of its oldest exchanges are left out so that all fit.

    The fewest with which they do; None where none do, and why where the chat template refuses the row.
    template: of all rows, or of each.

    Found by bisection: with one exchange less at a time a dialogue of n exchanges would be tokenised n times.
    """
    found: list[tuple[tuple[Example, ...], int] | str | None] = [None] * len(rows)
    if not isinstance(template, str):
        for one in dict.fromkeys(template):
            which = [i for i, name in enumerate(template) if name == one]
            fitted = fit([rows[i] for i in which], tokenizer, one, max_length)
            for i, outcome in zip(which, fitted, strict=True):
                found[i] = outcome
        return found
    fewest, most = [0] * len(rows), [len(_later_questions(row)) for row in rows]
    tried = [0] * len(rows)  # most dialogues fit as they are
    waiting = list(range(len(rows)))
    while waiting:
        attempts = [_without_oldest(rows[i], tried[i]) for i in waiting]
        for i, encoded in zip(waiting, _encode(attempts, tokenizer, template), strict=True):
            if isinstance(encoded, str):
                found[i], most[i] = encoded, -1
            elif max(len(example.tokens) for example in encoded) <= max_length:
                found[i], most[i] = (encoded, tried[i]), tried[i] - 1
            else:
                fewest[i] = tried[i] + 1
            tried[i] = (fewest[i] + most[i]) // 2
        waiting = [i for i in waiting if fewest[i] <= most[i]]
    return found


def _encode(rows: Sequence[Asked], tokenizer: object, template: str) -> list[tuple[Example, ...] | str]:
    """Each row's examples, or why the chat template refuses one of them."""
    whole = [
        Conversation((*row.prompt, Turn("assistant", text)), row.templated)
        for row in rows
        for text in row.answers
    ]
    outcomes = iter(encode_each(whole, tokenizer, templates=[template], max_length=2**31))
    found: list[tuple[Example, ...] | str] = []
    for row in rows:
        of_row = [next(outcomes) for _ in row.answers]
        examples = tuple(one.example for one in of_row if one.example is not None)
        refusals = [one.reason for one in of_row if one.example is None]
        found.append(refusals[0] if refusals else examples)
    return found


def _later_questions(row: Asked) -> list[int]:
    """Where the row's turns other than system turns could begin instead of at the first."""
    return [
        i
        for i, turn in enumerate(t for t in row.prompt if t.role != "system")
        if turn.role == "user" and i > 0
    ]


def _without_oldest(row: Asked, exchanges: int) -> Asked:
    """The row without that many of its first questions and their answers; system turns stay."""
    if not exchanges:
        return row
    system = [t for t in row.prompt if t.role == "system"]
    turns = [t for t in row.prompt if t.role != "system"]
    return row._replace(prompt=(*system, *turns[_later_questions(row)[exchanges - 1] :]))
