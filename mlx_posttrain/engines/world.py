"""The processes that train together. One process is a world of its own, in which every sum is its own value.

The loop asks a world for totals, so that several machines can be added behind this protocol without changing
a method: prompts and rows are numbered globally, and a step's totals are known before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Array = Any


class World(Protocol):
    """Ranks from 0 to ``size - 1``; every method is called by all of them, in the same order."""

    rank: int
    size: int

    def sum(self, arrays: Sequence[Array]) -> list[Array]:
        """The sum over all ranks of each array; shapes and dtypes are the same on all."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (what JSON can hold), by rank."""

    def barrier(self) -> None:
        """Return when every rank has come here."""


@dataclass(frozen=True)
class SingleProcess:
    """The world of one process."""

    rank: int = 0
    size: int = 1

    def sum(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays themselves."""
        return list(arrays)

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def barrier(self) -> None:
        """Nothing to wait for."""
