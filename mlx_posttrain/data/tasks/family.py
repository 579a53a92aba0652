"""Families of tasks, and the balanced, seeded stream of rows that is made of them.

A family draws items; its phrasings are templates over an item's slots. What an item asks, apart from
names, order and wording, is its content. A checksum of the content alone decides what is held out, so no
seed, limit, choice of families or other spelling can move a held-out content into the training split.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_posttrain.errors import UserError

SPLITS = ("train", "valid", "phrasing")
SIZES = {"train": 6000, "valid": 600, "phrasing": 600}
HELD_OUT_ONE_IN = 6
MISSES_UNTIL_EXHAUSTED = 1500


@dataclass(frozen=True)
class Item:
    """One question, without its wording.

    ``slots`` fill the phrasings; ``answer`` is right, ``checker`` checks any answer, and ``wrong`` answers
    are plausible. ``content`` is canonical: items with the same content, of whichever family, are in the same
    split. See :func:`content` and :func:`unordered`.
    """

    content: str
    slots: dict[str, str]
    answer: str
    checker: dict[str, Any]
    wrong: tuple[str, ...] = ()
    thinking: str = ""

    @property
    def surface(self) -> tuple[str, ...]:
        """What the phrasings show of the item."""
        return tuple(self.slots.values())

    @property
    def held_out(self) -> bool:
        """Whether the item's content is held out from training."""
        return zlib.crc32(self.content.encode()) % HELD_OUT_ONE_IN == 0


def content(kind: str, *parts: object) -> str:
    """Return the canonical content of parts whose order matters.

    Families whose questions have the same solution use the same ``kind``.
    """
    return f"{kind}: {' '.join(map(str, parts))}"


def unordered(kind: str, parts: Iterable[object]) -> str:
    """Return the canonical content of parts in any order: numbers by value, others by their text."""
    return content(kind, *sorted(parts, key=lambda part: (part if isinstance(part, int) else 0, str(part))))


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Phrasings are templates of the form ``"instruction | input"`` or ``"instruction"``; those in ``held`` are
    never trained.
    """

    name: str
    about: str
    train: tuple[str, ...]
    held: tuple[str, ...]
    draw: Callable[[random.Random], Item] = field(repr=False)

    def text(self, item: Item, phrasing: int) -> tuple[str, str]:
        """Return (instruction, input) of an item in a phrasing."""
        instruction, _, given = (self.train + self.held)[phrasing].partition(" | ")
        return instruction.format(**item.slots), given.format(**item.slots)


class Row(NamedTuple):
    """One item of a family in one phrasing."""

    family: Family
    item: Item
    phrasing: int


def family(
    about: str, *, train: Sequence[str], held: Sequence[str]
) -> Callable[[Callable[[random.Random], Item]], Family]:
    """Return a decorator that turns a function that draws an item into a ``Family`` of the same name."""
    return lambda draw: Family(draw.__name__, about, tuple(train), tuple(held), draw)


def _rows_of(one: Family, split: str, seed: int) -> Iterator[Row]:
    """Yield a family's rows.

    Every item comes once, until the draws bring no new ones; then the same items follow in their other
    phrasings.
    """
    # "train" and "phrasing" share this generator, and so their items.
    rng = random.Random(f"{seed}/{one.name}/content")
    phrasing_rng = random.Random(f"{seed}/{one.name}/{split}/phrasing")
    usable = (
        range(len(one.train))
        if split != "phrasing"
        else range(len(one.train), len(one.train) + len(one.held))
    )
    drawn: dict[tuple[str, ...], tuple[Item, int]] = {}
    misses = 0
    while misses < MISSES_UNTIL_EXHAUSTED:
        item = one.draw(rng)
        if item.surface in drawn or item.held_out != (split == "valid"):
            misses += 1
            continue
        misses = 0
        first = phrasing_rng.randrange(len(usable))
        drawn[item.surface] = item, first
        yield Row(one, item, usable[first])
    for later in range(1, len(usable)):
        for item, first in drawn.values():
            yield Row(one, item, usable[(first + later) % len(usable)])


def rows(
    catalogue: Mapping[str, Family], split: str, seed: int, families: Sequence[str] | None = None
) -> Iterator[Row]:
    """Return an iterator over the shuffled rows of a split.

    Each round has one row of every family that is not exhausted.

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
    """Yield rounds of one row from every stream, each in a new order, until all streams are exhausted."""
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
    """Return the number of rows to take: ``limit``, or the split's default size.

    Raises:
        UserError: a negative limit.
    """
    if limit is not None and limit < 0:
        raise UserError(f"the limit of the embedded tasks is {limit}; it must be 0 or more")
    return SIZES[split] if limit is None else limit
