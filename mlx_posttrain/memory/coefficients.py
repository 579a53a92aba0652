"""What a model's blocks keep for their backward pass, reckoned from its sizes by coefficients that were
measured.

MLX's are of the peaks of training steps, on its CPU backend, of small random GPT-2 and Llama models whose
layers, widths, heads and lengths were changed one at a time, and for lean blocks, which are large ones, of
GPT-2 124M. Torch's are of GPT-2 124M's process, and for gated blocks of the tensors that autograd saves, with
the same allowance for what a process holds besides. tests/memory/test_plan.py holds predictions against
measured peaks.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """A block's sizes in features: width; inner, of the feed-forward; keys, of all key heads together;
    heads.
    """

    width: int
    inner: int
    keys: int
    heads: int


class Kept(NamedTuple):
    """What blocks keep, in numbers.

    width, inner, keys: for each token so many times the block's sizes, in every block. pairs: for each head
    and pair of positions, in every block. working, working_pairs: the same in all for each token and unit of
    width, and each head and pair, since the blocks take turns. again: how many blocks' worth is alive where
    whole blocks are recomputed.
    """

    width: float
    inner: float
    keys: float
    pairs: float
    working: float
    working_pairs: float
    again: float

    def numbers(
        self, block: Block, blocks: float, rows: int, length: int, packed: int | None = None
    ) -> float:
        """Of so many blocks together, for a batch of so many rows and padded length. packed: its tokens where
        rows are packed into one.
        """
        tokens, pairs = rows * length if packed is None else packed, rows * block.heads * length**2
        each = (
            tokens * (self.width * block.width + self.inner * block.inner + self.keys * block.keys)
            + self.pairs * pairs
        )
        if packed is not None:
            each += (SPREAD * rows * length - (SPREAD - 1) * packed) * block.width
        return blocks * each + tokens * self.working * block.width + self.working_pairs * pairs


#: mlx: a block as mlx-lm has it (engines/base.py, block_bytes); lean: engines/mlx_lean.py; gated: with a
#: gated feed-forward, as Llama's.
KEPT = {
    "mlx": Kept(15.8, 3.0, 0.0, 0.0, 30.0, 2.0, 3.6),
    "mlx, adapter": Kept(11.0, 3.0, 0.0, 0.0, 42.0, 1.7, 3.6),
    "mlx lean": Kept(9.0, 1.5, 0.0, 0.0, 8.0, 1.0, 2.0),
    "mlx lean, adapter": Kept(7.5, 1.5, 0.0, 0.0, 13.0, 2.5, 2.0),
    "mlx gated": Kept(5.9, 5.6, 2.3, 0.9, 40.0, 1.7, 1.0),
    "mlx gated, adapter": Kept(4.7, 4.8, 3.6, 0.5, 18.0, 4.6, 1.0),
    "torch": Kept(12.0, 2.5, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch, adapter": Kept(15.0, 2.85, 0.0, 0.0, 0.0, 0.0, 2.0),
    "torch gated": Kept(11.0, 5.5, 2.75, 0.0, 0.0, 0.0, 2.0),
    "torch gated, adapter": Kept(9.5, 5.2, 3.5, 0.0, 0.0, 0.0, 2.0),
}

#: Attention of packed rows keeps so many arrays that are spread out again: queries, keys, values and what it
#: returns, of which one is gathered.
SPREAD = 4.0

#: Copies of every DoRA layer's output that are kept besides, and of its weight.
DORA = {"mlx": (1.0, 0.0), "torch": (2.0, 2.0)}

#: What GPT-2's blocks keep besides where MLX's stock functions take the place of our own
#: (engines/mlx_gelu.py, engines/mlx_attention.py), which are for float32 on Linux's CPU: copies of the
#: feed-forward's inner features, and of the attention weights in blocks that are not lean.
STOCK_GELU, STOCK_ATTENTION = 2.0, 1.2

#: How many times the largest block's arrays a pass without gradients takes: MLX allocates ahead for
#: operations that are queued. Measured on 32 rows of 512 tokens of GPT-2 124M.
FORWARD = {"mlx": 2.5, "torch": 1.0}
#: Of those arrays the ones with a number for each head and pair of positions: in a pass over a batch, in one
#: beside which a reference's blocks run, and in one that fills a cache with prompts.
PAIRS = {"mlx": 2.0, "torch": 2.0}
PAIRS_BESIDE = {"mlx": 3.5, "torch": 2.0}
PAIRS_OF_PROMPTS = {"mlx": 0.5, "torch": 2.0}

#: Arrays of one chunk of logits that are alive at once, besides what is kept of them: MLX allocates ahead for
#: operations that are queued, so with a trained head and a frozen one so many for each chunk, up to the
#: second number; and of all logits, where a quantised head has them all.
CHUNKS_ALIVE = {"mlx": ((3.0, 8.0), (4.5, 12.0)), "torch": ((3.0, 3.0), (3.0, 3.0))}
LOGITS_ALIVE = 4.5
#: The same with a divergence from a reference, whose logits are beside them: so many times that.
REFERENCE_ALIVE = {"mlx": 1.4, "torch": 2.0}
#: And in a pass without gradients, as CHUNKS_ALIVE: without and with a divergence. Measured on 64 to 3,072
#: positions of GPT-2 124M and of the embedded model.
EVALUATED_ALIVE = {"mlx": ((7.0, 20.0), (12.5, 24.0)), "torch": ((3.0, 3.0), (6.0, 6.0))}
#: The share of such a pass's block that is still there when all its logits are one chunk, which MLX may form
#: early: it waits for no other.
OVERLAP = {"mlx": 0.4, "torch": 0.0}
