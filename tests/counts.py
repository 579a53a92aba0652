"""What MLX work costs a GPU, counted: waits of the host, bytes read back, and operations.

A wait is a call that returns only when arrays are there: mx.eval, mx.synchronize, item(), tolist(), a number
or NumPy array made of an mx.array. An operation is a node of the graphs that are handed to MLX, less those
that only view another array.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

#: Primitives that make another view of an array, or nothing at all.
VIEWS = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Load",
    "NumberOfElements",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}


@dataclass
class Counts:
    """Waits, bytes moved to the host, and operations since counting began."""

    waits: int = 0
    bytes: int = 0
    operations: int = 0

    def since(self, before: Counts) -> Counts:
        """What has been added since a copy was taken."""
        return Counts(
            self.waits - before.waits, self.bytes - before.bytes, self.operations - before.operations
        )

    def copy(self) -> Counts:
        """The counts as they are now."""
        return Counts(self.waits, self.bytes, self.operations)


def operations(*arrays: Any) -> list[str]:
    """Names of the primitives of a graph that have not been handed to MLX yet, views left out."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    text = io.StringIO()
    mx.export_to_dot(text, *(a for _, a in tree_flatten(list(arrays)) if isinstance(a, mx.array)))
    return [name for name in re.findall(r'label ="(\w+)"', text.getvalue()) if name not in VIEWS]


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what happens within the context."""
    import mlx.core as mx

    found = Counts()

    def waits(function: Callable[..., Any], reads: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            arrays = args[:1] if reads else args
            if not reads or isinstance(args[0], mx.array):
                found.waits += 1
                found.operations += len(operations(*arrays))
                found.bytes += args[0].nbytes if reads else 0
            return function(*args, **kwargs)

        return call

    def hands_over(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found.operations += len(operations(*args))
            return function(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("eval", "synchronize"):
            patch.setattr(mx, name, waits(getattr(mx, name), reads=False))
        patch.setattr(mx, "async_eval", hands_over(mx.async_eval))
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
            patch.setattr(mx.array, name, waits(getattr(mx.array, name), reads=True))
        for name in ("array", "asarray", "ascontiguousarray"):
            patch.setattr(np, name, waits(getattr(np, name), reads=True))
        yield found
