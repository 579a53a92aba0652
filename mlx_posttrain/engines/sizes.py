"""How large the pieces are in which work is done: constants that fit a small machine, times a scale."""

from __future__ import annotations

#: Bytes of the working set for which the constants were chosen: that of a Mac with 8 GB.
CHOSEN_FOR = 16 * 2**30 // 3

#: Attention weights are a number for each head and pair of positions. Bytes of one block's in float32 above
#: which queries are taken a chunk at a time; bytes of a chunk's; and the most chunks that a row is cut into.
ATTENTION_ABOVE, ATTENTION_CHUNK, MOST_CHUNKS = 128 * 2**20, 32 * 2**20, 32

#: Chunks of queries are multiples of this many positions; see engines/fused.py, PANEL.
QUERIES = 64

_scale = 1


def fit(working_set: int) -> None:
    """Set the scale for the whole process, from the bytes that Metal advises to use at most."""
    global _scale
    _scale = max(1, working_set // CHOSEN_FOR)


def scale() -> int:
    """The factor on sizes in bytes of chunks of logits and queries, cached gradients and lean blocks.

    1 where there is no Metal.
    """
    return _scale


def query_chunks(rows: int, heads: int, length: int) -> list[slice]:
    """The parts of ``length`` positions whose attention is computed at once; all of them in short rows."""
    every = 4 * rows * heads * length**2
    if every <= _scale * ATTENTION_ABOVE:
        return [slice(0, length)]
    count = min(MOST_CHUNKS, -(-every // (_scale * ATTENTION_CHUNK)))
    size = -(-length // (count * QUERIES)) * QUERIES
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]
