"""Prompts of a rollout: from any rows that have one, in an order that depends on the seed only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_posttrain.config import DataSection
from mlx_posttrain.console import log
from mlx_posttrain.data import drops, mixture
from mlx_posttrain.data.formats import Record
from mlx_posttrain.data.read import NONE_HELD_OUT, read_rows, say_own_chat, say_specials, with_system
from mlx_posttrain.data.split import split_rows
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.rl.rollouts import Prompt

# turns before the answer, whether a template goes around them, other columns, source of a mixture
PromptRow = tuple[tuple[Turn, ...], bool, Mapping[str, Any], str]


def read(
    data: DataSection, tokenizer: Any, context: int | None, max_tokens: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts as token ids.

    Rows of any format will do, those with nothing but a ``prompt`` too; a row's own answer becomes the column
    ``reference_answer``. A row without a question is dropped and counted, and so is a prompt longer than
    data.max_length, or one that leaves no room for ``max_tokens`` in the context. Raises UserError when none
    is left to train on.
    """
    found = [[_prompt_row(row) for row in rows] for rows in split_rows(data, seed, _read_with_system)]
    room = min(data.max_length, (context or data.max_length + max_tokens) - max_tokens)
    if room < 1:
        raise UserError(
            f"rollout.max_tokens={max_tokens} leaves no room for a prompt in the model's "
            f"context of {context}: lower it"
        )
    say_own_chat(data, tokenizer, any(templated for _, templated, *_ in found[0]))
    kept = []
    for what, rows in zip(("prompts", "held-out prompts"), found, strict=True):
        encoded = _encode(rows, tokenizer, data)
        questions = [q for q in encoded if isinstance(q, Prompt)]
        prompts = [q for q in questions if len(q.tokens) <= room]
        refusals = [q for q in encoded if isinstance(q, UserError)]
        say_specials(([turn.content for turn in turns] for turns, *_ in rows), tokenizer, what)
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
                f"{data.origin}: no row has a question to answer ({refusals[0]}); give rows with a column "
                "'prompt', or another data.template"
            )
        if rows and not prompts:
            if what == "prompts":
                raise UserError(
                    f"{data.origin}: every prompt is longer than {room} tokens: raise data.max_length or "
                    "lower rollout.max_tokens"
                )
            log(NONE_HELD_OUT.format(what=what))
        kept.append(prompts)
    return kept[0], kept[1]


def _read_with_system(data: DataSection, *, split: str, limit: int | None, seed: int) -> list[Record]:
    rows = read_rows(data, split=split, limit=limit, seed=seed, wants="prompts")
    return [with_system(row, data.system) for row in rows]


def _prompt_row(row: Conversation | Preference | Labelled) -> PromptRow:
    if not isinstance(row, Conversation):
        return row.prompt, row.templated, row.extra, row.source
    if row.turns[-1].role != "assistant":
        return row.turns, row.templated, row.extra, row.source
    answer = {"reference_answer": row.turns[-1].content}
    return row.turns[:-1], row.templated, {**row.extra, **answer}, row.source


def _encode(rows: list[PromptRow], tokenizer: Any, data: DataSection) -> list[Prompt | UserError]:
    """The rows' prompts, or why a row cannot be asked."""
    templates = {name: mixture.first(part.template) for name, part in data.parts.items()}
    asked = [(turns, templated, templates[source]) for turns, templated, _, source in rows]
    return [
        ids if isinstance(ids, UserError) else Prompt(tuple(ids), turns[-1].content, columns, source)
        for ids, (turns, _, columns, source) in zip(mixture.try_prompts(asked, tokenizer), rows, strict=True)
    ]


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
