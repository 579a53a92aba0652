"""Rows of several sources as one set: how many of each, in what order, and each as its source says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from mlx_posttrain.config import DataSection
from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Conversation, Example, Turn
from mlx_posttrain.errors import UserError


class Sourced(Protocol):
    """A row, or what was made of it."""

    @property
    def source(self) -> str:
        """The name of its source; "" where there is one source only."""


T = TypeVar("T")
ROUNDING = 1e-9  # relative; a share times a number of rows may be this far from whole


def counts(available: Sequence[int], weights: Sequence[float] | None, limit: int | None) -> list[int]:
    """How many rows each source gives: in all at most ``limit``, and none more than it has.

    weights: the sources' shares, whatever they add up to; the mixture is then as large as the smallest source
    for its share allows. None: sources give all that they have, or with a limit shares of it in proportion.
    Parts of rows go to the sources with the largest remainders.
    """
    whole = sum(available)
    if weights is None:
        if limit is None or limit >= whole:
            return list(available)
        weights = available
    shares = [weight / sum(weights) for weight in weights]
    possible = min(have / share for have, share in zip(available, shares, strict=True) if share)
    return divide(min(limit or whole, math.floor(possible * (1 + ROUNDING))), shares)


def divide(total: int, shares: Sequence[float]) -> list[int]:
    """``total`` in whole numbers in proportion to ``shares``, which add up to 1: the largest remainders."""
    exact = [total * share for share in shares]
    found = [math.floor(part * (1 + ROUNDING)) for part in exact]
    rest = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for i in rest[: total - sum(found)]:
        found[i] += 1
    return found


def interleave(parts: Iterable[Sequence[T]]) -> list[T]:
    """The items of all parts, so that any stretch of them has about the shares of the whole.

    Items of one part stay in their order.
    """
    placed = [
        ((i + 0.5) / len(part), number, item)
        for number, part in enumerate(parts)
        for i, item in enumerate(part)
    ]
    return [item for _, _, item in sorted(placed, key=lambda one: one[:2])]


def tally(
    data: DataSection, train: Iterable[Sourced], held_out: Iterable[Sourced]
) -> dict[str, dict[str, int]]:
    """How many items of each source there are, ``train`` and ``held_out``; empty without a mixture."""
    trained, unseen = (Counter(item.source for item in items) for items in (train, held_out))
    return {name: {"train": trained[name], "held_out": unseen[name]} for name in data.parts if name}


def encode_by_source(
    rows: Sequence[Conversation],
    data: DataSection,
    encoded: Callable[[list[Conversation], DataSection, str], list[Example]],
) -> list[Example]:
    """Examples of a mixture's rows, each source by itself, interleaved.

    encoded: from the rows of a source, its section and its name. Raises UserError naming the source.
    """
    found = []
    for name, part in data.parts.items():
        try:
            examples = encoded([row for row in rows if row.source == name], part, name)
        except UserError as error:
            raise UserError(f"{part.origin}: {error}") from None
        found.append([replace(example, source=name) for example in examples])
    return interleave(found)


def templates(rows: Iterable[Sourced], data: DataSection) -> list[str]:
    """The name of each row's template; of several the first."""
    names = {name: first(part.template) for name, part in data.parts.items()}
    return [names[row.source] for row in rows]


def first(template: str | Sequence[str]) -> str:
    """The template under which a model is asked that was trained with this one, or with these."""
    return template if isinstance(template, str) else template[0]


def try_prompts(
    asked: Sequence[tuple[Sequence[Turn], bool, str]], tokenizer: Any
) -> list[list[int] | UserError]:
    """:func:`mlx_posttrain.data.encode.try_prompts` of (turns, templated, template)."""
    found: dict[int, list[int] | UserError] = {}
    for way in dict.fromkeys((templated, template) for _, templated, template in asked):
        which = [i for i, (_, *how) in enumerate(asked) if tuple(how) == way]
        turns = [asked[i][0] for i in which]
        encoded = encode.try_prompts(turns, tokenizer, way[1], templated=way[0])
        found.update(zip(which, encoded, strict=True))
    return [found[i] for i in range(len(asked))]


def described(numbers: Mapping[str, int]) -> str:
    """Counts by source with their shares: ``2,100 of alpaca (70%), 900 of rows (30%)``."""
    whole = max(1, sum(numbers.values()))
    return ", ".join(f"{n:,} of {name} ({n / whole:.1%})" for name, n in numbers.items())
