"""Prompts of a rollout: from any rows that have one, in an order that depends on the seed only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_posttrain.config import DataSection
from mlx_posttrain.console import log
from mlx_posttrain.data import drops, encode
from mlx_posttrain.data.read import NONE_HELD_OUT, read_rows, say_specials, split_rows, with_system
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.rl.rollouts import Prompt

# turns before the answer, whether a template goes around them, other columns
PromptRow = tuple[tuple[Turn, ...], bool, Mapping[str, Any]]


def read(
    data: DataSection, tokenizer: Any, context: int | None, max_tokens: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts as token ids.

    Rows of any format will do, those with nothing but a ``prompt`` too; a row's own answer becomes the column
    ``reference_answer``. A row without a question is dropped and counted, and so is a prompt longer than
    data.max_length, or one that leaves no room for ``max_tokens`` in the context. Raises UserError when none
    is left to train on.
    """
    found = [
        [_prompt_row(with_system(row, data.system)) for row in rows]
        for rows in split_rows(data, seed, read_rows)
    ]
    room = min(data.max_length, (context or data.max_length + max_tokens) - max_tokens)
    if room < 1:
        raise UserError(
            f"rollout.max_tokens={max_tokens} leaves no room for a prompt in the model's "
            f"context of {context}: lower it"
        )
    kept = []
    for what, rows in zip(("prompts", "held-out prompts"), found, strict=True):
        encoded = _encode(rows, tokenizer, str(data.template))
        questions = [q for q in encoded if isinstance(q, Prompt)]
        prompts = [q for q in questions if len(q.tokens) <= room]
        refusals = [q for q in encoded if isinstance(q, UserError)]
        say_specials(([turn.content for turn in turns] for turns, _, _ in rows), tokenizer, what)
        if rows:
            log(
                f"{what}: {len(prompts):,} of {len(rows):,} kept ({len(questions) - len(prompts):,} longer "
                f"than {room} tokens)" + (f"; {len(refusals):,} dropped: {refusals[0]}" if refusals else "")
            )
        if what == "prompts":
            drops.add({"too long": len(questions) - len(prompts)})
            drops.add(Counter(map(str, refusals)))
        if what == "prompts" and rows and not questions:
            raise UserError(
                f"{data.source}: no row has a question to answer ({refusals[0]}); give rows with a column "
                "'prompt', or another data.template"
            )
        if rows and not prompts:
            if what == "prompts":
                raise UserError(
                    f"{data.source}: every prompt is longer than {room} tokens: raise data.max_length or "
                    "lower rollout.max_tokens"
                )
            log(NONE_HELD_OUT.format(what=what))
        kept.append(prompts)
    return kept[0], kept[1]


def _prompt_row(row: Conversation | Preference | Labelled) -> PromptRow:
    if not isinstance(row, Conversation):
        return row.prompt, row.templated, row.extra
    if row.turns[-1].role != "assistant":
        return row.turns, row.templated, row.extra
    return row.turns[:-1], row.templated, {**row.extra, "reference_answer": row.turns[-1].content}


def _encode(rows: list[PromptRow], tokenizer: Any, template: str) -> list[Prompt | UserError]:
    """The rows' prompts, or why a row cannot be asked."""
    found: dict[int, Prompt | UserError] = {}
    for templated in (True, False):
        which = [i for i, row in enumerate(rows) if row[1] is templated]
        encoded = encode.try_prompts([rows[i][0] for i in which], tokenizer, template, templated=templated)
        for i, ids in zip(which, encoded, strict=True):
            if isinstance(ids, UserError):
                found[i] = ids
            else:
                found[i] = Prompt(tuple(ids), rows[i][0][-1].content, rows[i][2])
    return [found[i] for i in range(len(rows))]


def order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the prompts for a pass over them.

    -1 is the pass that rewards are normalised on.
    """
    return np.random.default_rng([seed, 0x9203, epoch + 1]).permutation(count).tolist()


def of_step(count: int, wanted: int, seed: int, step: int) -> list[int]:
    """The prompts of a step: ``wanted`` in a row from an endless list of passes, each in its own order."""
    found: list[int] = []
    for position in range(step * wanted, (step + 1) * wanted):
        epoch, place = divmod(position, count)
        if place == 0 or not found:
            current = order(count, seed, epoch)
        found.append(current[place])
    return found
