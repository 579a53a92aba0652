"""Memory of one network in training, in GB by part, from its size and the shapes of its batches.

Weights, gradients and moments are counted. What the backward pass keeps is computed from measured
coefficients (memory/coefficients.py). tests/memory/test_plan.py compares the sums with runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_posttrain.data.batches import PACKING, Batch, layout
from mlx_posttrain.engines import fused, sizes
from mlx_posttrain.engines.base import LEAN_ABOVE, UPDATE_BYTES, block_bytes
from mlx_posttrain.memory.coefficients import (
    CHUNK_PAIRS,
    CHUNKS_ALIVE,
    DORA,
    EVALUATED_ALIVE,
    FORWARD,
    KEPT,
    OVERLAP,
    PAIRS,
    PAIRS_BESIDE,
    REFERENCE_ALIVE,
    SPREAD,
    STOCK_ATTENTION,
    STOCK_GELU,
    Block,
)
from mlx_posttrain.memory.model_size import Size

GB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Architectures on which the blocks' coefficients were measured, and engines on which DoRA's were.
MEASURED = {"mlx": ("gpt2", "llama"), "torch": ("gpt2",)}
MEASURED_DORA = ("mlx",)


class Shape(NamedTuple):
    """The shape of a batch: rows, padded length and trained positions.

    packed: the tokens that go through the model where an engine packs rows into one.
    """

    rows: int
    length: int
    positions: int
    packed: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.rows * self.length if self.packed is None else self.packed

    def part(self, share: float = 1.0, longest: int | None = None) -> Shape:
        """A share of the rows, each cut to ``longest`` tokens, with positions in proportion."""
        rows, length = max(1, math.ceil(self.rows * share)), min(self.length, longest or self.length)
        left = rows * length / (self.rows * self.length)
        return Shape(
            rows,
            length,
            math.ceil(self.positions * left),
            None if self.packed is None else math.ceil(self.packed * left),
        )


def shapes(batches: Iterable[Batch], packs: str | None = None) -> list[Shape]:
    """The distinct shapes of batches; packs: the engine that packs their rows (``Training.packs``)."""
    found = []
    for b in batches:
        tokens = None
        if packs and (packed := layout(b.tokens, b.index, PACKING[packs])):
            tokens = PACKING[packs].tokens(len(packed[1]), b.tokens.size)
        rows, length = b.tokens.shape
        found.append(Shape(rows, length, len(b.index), tokens))
    return distinct(found)


def distinct(found: Iterable[Shape]) -> list[Shape]:
    """Each shape once, with the most tokens that any batch of it puts through the model."""
    largest: dict[tuple[int, ...], Shape] = {}
    for shape in found:
        largest[shape[:3]] = max(shape, largest.get(shape[:3], shape), key=lambda s: s.tokens)
    return [largest[key] for key in sorted(largest)]


@dataclass(frozen=True)
class Training:
    """One network in training: how it is trained, and the shapes of its batches.

    mixed: whether its blocks compute in bfloat16 with float32 weights. adapted: (in, out) of the layers that
    an adapter stands on. divergence: whether the loss has one from the reference, over the whole vocabulary.
    beside: whether evaluations run the reference's blocks too, because its hidden states are not cached.
    """

    engine: str
    size: Size
    trained: int
    adapter: bool
    dtype: str = "float32"
    bits: int | None = None
    group_size: int = 64
    mixed: bool = False
    adapted: Sequence[tuple[int, int]] = ()
    dora: bool = False
    checkpointing: bool = False
    dropout: bool = False
    reference: bool = False
    divergence: bool = False
    beside: bool = False
    grad_accumulation: bool = False
    batches: Sequence[Shape] = ()
    evaluations: Sequence[Shape] = ()

    @property
    def number(self) -> int:
        """Bytes of one number of the activations, and of the weights but in mixed precision.

        Between products torch keeps them in float32 there: what it saves of them is not counted.
        """
        return 2 if self.mixed and self.engine == "mlx" else self.held

    @property
    def held(self) -> int:
        """Bytes of one number of the weights."""
        return DTYPE_BYTES[self.dtype]

    @property
    def copies(self) -> float:
        """GB of the copies in bfloat16 of the blocks' weights; torch makes them anew in every pass."""
        return 2 * (self.size.parameters - self.size.outer) / GB if self.mixed else 0.0

    @property
    def packs(self) -> str | None:
        """The engine, where it packs rows into one with shared prefixes; else None.

        See engines/torch/packed.py and engines/mlx/packed.py.
        """
        gpt2 = self.size.model_type == "gpt2" and not (self.adapter and self.dropout)
        return self.engine if gpt2 and not (self.engine == "mlx" and self.checkpointing) else None

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained parameters, and so of their gradients and of each moment.

        An adapter's are float32.
        """
        return self.trained * (4 if self.adapter else self.held)

    def weights(self) -> float:
        """GB of the weights in memory, an adapter's included."""
        adapter = 4 * self.trained if self.adapter else 0
        if self.size.packed:
            return (self.size.packed_bytes + self.size.plain * self.held + adapter) / GB
        number = self.held
        saved = 0.0
        if self.bits:  # the linear layers, each group of weights with a scale and an offset
            saved = sum(map(math.prod, self.size.linear.values())) * (
                number - self.bits / 8 - 2 * number / self.group_size
            )
        return (self.size.parameters * number + adapter - saved) / GB + self.copies

    def reference_copy(self) -> float:
        """GB of the frozen reference: 0 with an adapter, whose base is the reference."""
        if not self.reference or self.adapter:
            return 0.0
        every = self.size.parameters * self.held / GB
        return every - self.copies if self.engine == "mlx" else every

    def optimizer(self) -> float:
        """GB of AdamW's two moments."""
        return 2 * self.trained_bytes / GB

    def gradients(self) -> float:
        """GB of the gradients, on MLX also of a micro-batch's beside the sum of those before.

        torch adds to that sum weight by weight. On MLX a micro-batch's are in the format of its blocks.
        """
        if self.engine != "mlx":
            return self.trained_bytes / GB
        one = self.trained_bytes / GB - self.copies
        return one + (self.trained_bytes / GB if self.grad_accumulation else 0.0)

    def activations(self, batch: Shape) -> float:
        """GB that the blocks keep for the backward pass, with what an adapter adds.

        With checkpointing, of the blocks that are recomputed at the same time.
        """
        of, blocks_are = self.size, self._blocks(batch)
        kept = KEPT[blocks_are]
        if self.engine == "mlx" and not of.gated and (self.number < 4 or sys.platform != "linux"):
            weights = 0.0 if "lean" in blocks_are else STOCK_ATTENTION
            kept = kept._replace(inner=kept.inner + STOCK_GELU, pairs=kept.pairs + weights)
        if (share := self._queries(batch)) < 1:
            kept = kept._replace(pairs=0.0, working_pairs=CHUNK_PAIRS * share)
        block = Block(of.width, of.inner, of.key_width, of.heads)
        blocks = min(kept.again, of.layers) if self.checkpointing else of.layers
        spread = 0.0 if "lean" in blocks_are else SPREAD  # recomputed
        numbers = kept.numbers(block, blocks, batch.rows, batch.length, batch.packed, spread)
        return (numbers * self.number + blocks / of.layers * self._beside(batch.tokens)) / GB

    def _queries(self, batch: Shape) -> float:
        """The share of a row's positions whose attention weights exist at once."""
        parts = sizes.query_chunks(batch.rows, self.size.heads, batch.length)
        return parts[0].stop / batch.length if self.engine == "mlx" else 1.0

    def inputs(self, batch: Shape) -> float:
        """GB of every block's input: what checkpointing keeps."""
        return self.size.layers * batch.tokens * self.size.width * self.number / GB

    def _beside(self, tokens: int) -> float:
        """Bytes that the adapted layers keep in addition to those of the blocks.

        In half precision their updates in float32; with DoRA the outputs before the magnitude, and weights
        that it computes.
        """
        outputs, weights = DORA[self.engine] if self.dora else (0.0, 0.0)
        if self.dora and (self.bits or self.size.packed):
            # The layer multiplies with its dequantised weight, which the gradient needs again.
            weights += 1
        half = 4 if self.number < 4 else 0
        each = [
            tokens * leaves * (outputs * self.number + half) + weights * enters * leaves * self.number
            for enters, leaves in self.adapted
        ]
        return sum(each)

    def _blocks(self, batch: Shape) -> str:
        of = self.size
        much = block_bytes(batch.rows, batch.length, of.width, of.heads) > sizes.scale() * LEAN_ABOVE
        lean = (
            self.engine == "mlx"
            and of.model_type == "gpt2"
            and much
            and not self.dropout
            and not self.checkpointing
        )
        return (
            self.engine
            + (" lean" if lean else " gated" if of.gated else "")
            + (", adapter" if self.adapter else "")
        )

    def logits(self, batch: Shape, training: bool = True) -> float:
        """GB of the chunks of logits that are alive.

        With a divergence the reference's logits are included, and in training the gradients that are cached
        for a trained head.
        """
        every = 4 * batch.positions * self.size.vocabulary
        beside = REFERENCE_ALIVE[self.engine] if self.divergence else 1.0
        chunks = fused.chunks(batch.positions, self.size.vocabulary)
        chunk = 4 * chunks[0].stop * self.size.vocabulary
        if not training:
            each, most = EVALUATED_ALIVE[self.engine][self.divergence]
            return min(most * chunk, each * every) / GB
        each, most = CHUNKS_ALIVE[self.engine][self.adapter]
        cached = 0 if self.adapter else fused.cached_positions(batch.positions, self.size.vocabulary)
        return (
            min(most, each * len(chunks)) * chunk * beside + self.held * self.size.vocabulary * cached
        ) / GB

    def head_copy(self) -> float:
        """GB of a frozen head with the rows of new tokens in it, which a micro-batch's losses read."""
        rows = self.size.vocabulary if self.adapter and self.size.new_tokens else 0
        return self.number * rows * self.size.width / GB

    def head(self) -> float:
        """GB of the head's gradient, which is made before the blocks have freed anything.

        0 with an adapter, whose head is frozen, and where torch adds it to that of earlier micro-batches.
        """
        there = self.adapter or (self.grad_accumulation and self.engine == "torch")
        return 0.0 if there else self.held * self.size.vocabulary * self.size.width / GB

    def decoding_head(self) -> float:
        """GB of the copy in float32 with which decoding multiplies where the head is in half precision."""
        half = self.held < 4 and not self.size.packed_head
        return 4 * self.size.vocabulary * self.size.width / GB if half else 0.0

    def forward(self, batch: Shape, pairs: dict[str, float] = PAIRS) -> float:
        """GB of a pass without gradients: one block's arrays.

        pairs: by engine, how many of them have a number for each head and pair of positions.
        """
        s, tokens = self.size, batch.tokens
        block = (
            tokens * (6 * s.width + (3 if s.gated else 2) * s.inner)
            + pairs[self.engine] * self._queries(batch) * batch.rows * s.heads * batch.length**2
        )
        return FORWARD[self.engine] * self.number * block / GB

    def phases(self) -> list[tuple[str, dict[str, float]]]:
        """(name, GB by part) of each phase of training, not counting weights and optimizer."""
        found: list[tuple[str, dict[str, float]]] = []
        beside = self.trained_bytes / GB if self.grad_accumulation else 0.0
        for b in self.batches:
            kept, gradients = self.activations(b), self.head() + beside
            logits = self.logits(b) + self.head_copy()
            if self.checkpointing:
                inputs = self.inputs(b)
                found.append(
                    (
                        "as the backward pass begins",
                        {"activations": inputs, "logits": logits, "gradients": gradients},
                    )
                )
                found.append(
                    (
                        "in the first block's backward pass",
                        {"activations": inputs + kept, "gradients": gradients},
                    )
                )
            else:
                found.append(
                    (
                        "as the backward pass begins",
                        {"activations": kept, "logits": logits, "gradients": gradients},
                    )
                )
        found.append(("in the update", {"gradients": self.gradients(), "update": self.update()}))
        for b in self.evaluations:
            blocks, one = (
                self.forward(b, PAIRS_BESIDE if self.beside else PAIRS),
                len(fused.chunks(b.positions, self.size.vocabulary)) == 1,
            )
            late = OVERLAP[self.engine] * blocks if one else 0.0
            found.append(("as an evaluation reads its rows", {"activations": blocks}))
            found.append(
                ("in an evaluation", {"activations": late, "logits": self.logits(b, training=False)})
            )
        return found

    def update(self) -> float:
        """GB of new weights and moments beside the old ones.

        On MLX of a group of parameters, or of the largest parameter; torch updates in place.
        """
        largest = max([UPDATE_BYTES, *(self.held * math.prod(shape) for shape in self.size.tensors.values())])
        return 3 * min(self.trained_bytes, largest) / GB if self.engine == "mlx" else 0.0

    @property
    def sure(self) -> bool:
        """Whether what the blocks keep was measured for this architecture on this engine."""
        return self.size.model_type in MEASURED[self.engine] and (
            not self.dora or self.engine in MEASURED_DORA
        )
