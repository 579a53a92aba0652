"""How large the pieces are in which work is done: constants that fit a small machine, times a scale."""

from __future__ import annotations

#: Bytes of the working set for which the constants were chosen: that of a Mac with 8 GB.
CHOSEN_FOR = 16 * 2**30 // 3

_scale = 1


def fit(working_set: int) -> None:
    """Set the scale for the whole process, from the bytes that Metal advises to use at most."""
    global _scale
    _scale = max(1, working_set // CHOSEN_FOR)


def scale() -> int:
    """The factor on sizes in bytes of chunks of logits, cached gradients and lean blocks.

    1 where there is no Metal.
    """
    return _scale
