"""What a family of tasks is, and how families become a balanced, seeded stream of rows.

A family draws contents (``Item``); its phrasings are templates over an item's slots. Which contents are held
out depends on a checksum of the content alone, so no seed, limit or choice of families can move a held-out
content into the training split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_posttrain.errors import UserError

SPLITS = ("train", "valid", "phrasing")
SIZES = {"train": 6000, "valid": 600, "phrasing": 600}
HELD_OUT_ONE_IN = 6
MISSES_UNTIL_EXHAUSTED = 1500


@dataclass(frozen=True)
class Item:
    """One content: what is asked (``slots``), the right ``answer``, how to check one, and plausible ``wrong``
    answers.

    ``key`` names the content for the split; two items with one key are the same content.
    """

    key: str
    slots: dict[str, str]
    answer: str
    checker: dict[str, Any]
    wrong: tuple[str, ...] = ()
    thinking: str = ""


@dataclass(frozen=True)
class Family:
    """A kind of task. Templates read ``"instruction | input"`` or just ``"instruction"``; ``held`` phrasings
    are never trained.
    """

    name: str
    about: str
    train: tuple[str, ...]
    held: tuple[str, ...]
    draw: Callable[[random.Random], Item] = field(repr=False)

    def text(self, item: Item, phrasing: int) -> tuple[str, str]:
        """Put an item into a phrasing; returns (instruction, input)."""
        instruction, _, given = (self.train + self.held)[phrasing].partition(" | ")
        return instruction.format(**item.slots), given.format(**item.slots)

    def held_out(self, item: Item) -> bool:
        """Return whether an item's content is kept from training."""
        return zlib.crc32(f"{self.name}/{item.key}".encode()) % HELD_OUT_ONE_IN == 0


class Row(NamedTuple):
    """One content of a family in one phrasing."""

    family: Family
    item: Item
    phrasing: int


def family(
    about: str, *, train: Sequence[str], held: Sequence[str]
) -> Callable[[Callable[[random.Random], Item]], Family]:
    """Turn a function that draws an item into a ``Family`` of the same name; returns the decorator."""
    return lambda draw: Family(draw.__name__, about, tuple(train), tuple(held), draw)


def _rows_of(one: Family, split: str, seed: int) -> Iterator[Row]:
    """Yield a family's rows: every content once while new ones turn up, then the same contents in their other
    phrasings.
    """
    # "train" and "phrasing" share the stream, hence the contents
    rng = random.Random(f"{seed}/{one.name}/content")
    turn = random.Random(f"{seed}/{one.name}/{split}/phrasing")
    usable = (
        range(len(one.train))
        if split != "phrasing"
        else range(len(one.train), len(one.train) + len(one.held))
    )
    seen: dict[str, tuple[Item, int]] = {}
    misses = 0
    while misses < MISSES_UNTIL_EXHAUSTED:
        item = one.draw(rng)
        if item.key in seen or one.held_out(item) != (split == "valid"):
            misses += 1
            continue
        misses = 0
        first = turn.randrange(len(usable))
        seen[item.key] = item, first
        yield Row(one, item, usable[first])
    for later in range(1, len(usable)):
        for item, first in seen.values():
            yield Row(one, item, usable[(first + later) % len(usable)])


def rows(
    catalogue: Mapping[str, Family], split: str, seed: int, families: Sequence[str] | None = None
) -> Iterator[Row]:
    """Return the shuffled mix of a split, made as it is read: each round brings one row of every family that
    still has some.

    Raises:
        UserError: an unknown split or family.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the embedded tasks; accepted: {', '.join(SPLITS)}")
    names = list(catalogue) if families is None else list(dict.fromkeys(families))
    for name in names:
        if name not in catalogue:
            raise UserError(
                f"unknown family {name!r} of the embedded tasks; accepted: {', '.join(catalogue)}"
            )
    return _mixed(
        {name: _rows_of(catalogue[name], split, seed) for name in names},
        random.Random(f"{seed}/{split}/order"),
    )


def _mixed(streams: dict[str, Iterator[Row]], order: random.Random) -> Iterator[Row]:
    """Yield one row of every stream in a new order, again and again, until all are empty."""
    while streams:
        round_ = list(streams)
        order.shuffle(round_)
        for name in round_:
            row = next(streams[name], None)
            if row is None:
                del streams[name]
            else:
                yield row


def size(split: str, limit: int | None) -> int:
    """Return how many rows to take: ``limit``, or the split's default size.

    Raises:
        UserError: a negative limit.
    """
    if limit is not None and limit < 0:
        raise UserError(f"the limit of the embedded tasks is {limit}; it must be 0 or more")
    return SIZES[split] if limit is None else limit
