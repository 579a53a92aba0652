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


#: mlx: a block as mlx-lm has it (engines/base.py, block_bytes); lean: engines/mlx_lean.py; gated: with a gated feed-forward, as Llama's.
KEPT = {
    "mlx": Kept(15.0, 3.0, 0.0, 1.0, 33.0, 2.0, 6.0),
    "mlx, adapter": Kept(6.5, 3.0, 0.0, 1.0, 52.0, 2.0, 6.0),
    "mlx lean": Kept(9.0, 1.5, 0.0, 0.0, 0.0, 3.0, 6.0),
    "mlx lean, adapter": Kept(9.0, 1.5, 0.0, 0.0, 0.0, 3.0, 6.0),
    "mlx gated": Kept(7.0, 6.0, 3.5, 1.0, 23.0, 2.0, 6.0),
    "mlx gated, adapter": Kept(2.0, 4.0, 4.0, 1.0, 53.0, 2.0, 6.0),
    "torch": Kept(12.0, 2.5, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch, adapter": Kept(15.0, 2.85, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch gated": Kept(11.0, 5.5, 2.75, 0.0, 0.0, 0.0, 2.0),
    "torch gated, adapter": Kept(9.5, 5.2, 3.5, 0.0, 0.0, 0.0, 2.0),
}

#: Copies of every DoRA layer's output that are kept besides, and of its weight.
DORA = {"mlx": (1.0, 0.0), "torch": (2.0, 2.0)}
