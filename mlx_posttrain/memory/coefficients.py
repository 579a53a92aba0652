"""Measured coefficients: what a model's blocks keep for their backward pass, by the model's sizes.

MLX's come from peaks of training steps on its CPU backend: of small random GPT-2 and Llama models whose
layers, widths, heads and lengths were changed one at a time and, for lean blocks, which are large ones, of
GPT-2 124M. Torch's come from the process of GPT-2 124M and, for gated blocks, from the tensors that autograd
saves, with the same allowance for what else a process holds. tests/memory/test_plan.py compares predictions
with measured peaks.
"""

from __future__ import annotations

from typing import NamedTuple

#: Arrays that the attention of packed rows keeps spread out to whole rows: queries, keys, values and its
#: output, of which one is gathered again.
SPREAD = 4.0


class Block(NamedTuple):
    """A transformer block's sizes in features.

    width: of the hidden states. inner: of the feed-forward. keys: of all key heads together. heads: their
    number.
    """

    width: int
    inner: int
    keys: int
    heads: int


class Kept(NamedTuple):
    """How many numbers blocks keep for the backward pass.

    width, inner, keys: in every block, for each token, as multiples of the block's sizes. pairs: in every
    block, for each head and pair of positions. working, working_pairs: in all blocks together, since they
    take turns, for each token and unit of width, and for each head and pair of positions. again: how many
    blocks' worth is alive where whole blocks are recomputed.
    """

    width: float
    inner: float
    keys: float
    pairs: float
    working: float
    working_pairs: float
    again: float

    def numbers(
        self,
        block: Block,
        blocks: float,
        rows: int,
        length: int,
        packed: int | None = None,
        spread: float = SPREAD,
    ) -> float:
        """The numbers that ``blocks`` blocks keep together.

        rows, length: of the batch, padded. packed: its tokens where rows are packed into one; spread: how
        many arrays are kept for whole rows then, of which one is gathered again.
        """
        tokens, pairs = rows * length if packed is None else packed, rows * block.heads * length**2
        each = (
            tokens * (self.width * block.width + self.inner * block.inner + self.keys * block.keys)
            + self.pairs * pairs
        )
        if packed is not None and spread:
            each += (spread * rows * length - (spread - 1) * packed) * block.width
        return blocks * each + tokens * self.working * block.width + self.working_pairs * pairs


#: mlx: mlx-lm's own block (engines/base.py, block_bytes); lean: engines/mlx/lean.py; gated: with a gated
#: feed-forward, as in Llama.
KEPT = {
    "mlx": Kept(15.8, 3.0, 0.0, 0.0, 30.0, 2.0, 3.6),
    "mlx, adapter": Kept(11.0, 3.0, 0.0, 0.0, 42.0, 1.7, 3.6),
    "mlx lean": Kept(9.0, 1.5, 0.0, 0.0, 8.0, 1.0, 2.0),
    "mlx lean, adapter": Kept(7.5, 1.5, 0.0, 0.0, 13.0, 2.5, 2.0),
    "mlx gated": Kept(5.9, 5.6, 2.3, 0.9, 40.0, 1.7, 1.0),
    "mlx gated, adapter": Kept(4.7, 4.8, 3.6, 0.5, 18.0, 3.3, 1.0),
    "torch": Kept(12.0, 2.5, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch, adapter": Kept(15.0, 2.85, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch gated": Kept(11.0, 5.5, 2.75, 0.0, 0.0, 0.0, 2.0),
    "torch gated, adapter": Kept(9.5, 5.2, 3.5, 0.0, 0.0, 0.0, 2.0),
}

#: Further copies that every DoRA layer keeps: of its output, and of its weight.
DORA = {"mlx": (1.0, 0.0), "torch": (2.0, 2.0)}

#: What GPT-2's blocks keep in addition where MLX's own functions run instead of those of engines/mlx/cpu
#: (gelu.py, attention.py), which are for float32 on a Linux CPU: copies of the feed-forward's inner features,
#: and of the attention weights in blocks that are not lean.
STOCK_GELU, STOCK_ATTENTION = 2.0, 1.2

#: Arrays of a chunk of queries' attention weights that are alive at once, where MLX takes long rows in chunks
#: (engines/mlx/long_rows.py): then no block keeps any.
CHUNK_PAIRS = 6.3

#: Memory of a pass without gradients, as a multiple of the largest block's arrays: MLX allocates ahead for
#: operations that are queued. Measured on 32 rows of 512 tokens of GPT-2 124M.
FORWARD = {"mlx": 2.5, "torch": 1.0}
#: How many of those arrays have a number for each head and pair of positions: in a pass over a batch, in one
#: where a reference's blocks run too, and in one that fills a cache with prompts.
PAIRS = {"mlx": 2.0, "torch": 2.0}
PAIRS_BESIDE = {"mlx": 3.5, "torch": 2.0}
PAIRS_OF_PROMPTS = {"mlx": 0.5, "torch": 2.0}

#: Arrays of one chunk's logits that are alive at once, not counting cached gradients: (for each chunk, at
#: most), with a trained head and with a frozen one. They grow with the number of chunks because MLX allocates
#: ahead for operations that are queued.
CHUNKS_ALIVE = {"mlx": ((3.0, 8.0), (4.5, 12.0)), "torch": ((3.0, 3.0), (3.0, 3.0))}
#: The factor on these with a divergence from a reference, whose logits are held as well.
REFERENCE_ALIVE = {"mlx": 1.4, "torch": 2.0}
#: As CHUNKS_ALIVE for a pass without gradients: without and with a divergence. Measured on 64 to 3,072
#: positions of GPT-2 124M and of the embedded model.
EVALUATED_ALIVE = {"mlx": ((7.0, 20.0), (12.5, 24.0)), "torch": ((3.0, 3.0), (6.0, 6.0))}
#: The share of such a pass's block that is still held when its logits are a single chunk, which MLX may form
#: early because it waits for no other.
OVERLAP = {"mlx": 0.4, "torch": 0.0}
