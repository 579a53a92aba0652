"""What a model's blocks keep for their backward pass, reckoned from its sizes by coefficients that were measured.

MLX's are of the peaks of training steps of small random GPT-2 and Llama models whose widths, heads and lengths were changed one at a time;
torch's of GPT-2 124M's process, and for gated blocks of the tensors that autograd saves, with the same allowance for what a process holds
besides. tests/test_plan.py holds predictions against measured peaks.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """A block's sizes in features: width; inner, of the feed-forward; keys, of all key heads together; heads."""

    width: int
    inner: int
    keys: int
    heads: int


class Kept(NamedTuple):
    """What blocks keep, in numbers.

    width, inner, keys: for each token so many times the block's sizes, in every block. pairs: for each head and pair of positions, in every
    block. working, working_pairs: the same in all for each token and unit of width, and each head and pair, since the blocks take turns.
    again: how many blocks' worth is alive where whole blocks are recomputed.
    """

    width: float
    inner: float
    keys: float
    pairs: float
    working: float
    working_pairs: float
    again: float

    def numbers(self, block: Block, layers: int, rows: int, length: int, *, checkpointing: bool) -> float:
        """Of all blocks together, for a batch of so many rows and padded length."""
        tokens, pairs = rows * length, rows * block.heads * length**2
        each = tokens * (self.width * block.width + self.inner * block.inner + self.keys * block.keys) + self.pairs * pairs
        working = tokens * self.working * block.width + self.working_pairs * pairs
        if checkpointing:  # each block's input, and some blocks in full
            return layers * tokens * block.width + self.again * each + working
        return layers * each + working
