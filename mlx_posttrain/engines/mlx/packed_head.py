"""A quantised head, for losses that read logits a chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class PackedHead:
    """The head's weight as MLX packs it, a row for each entry of the vocabulary.

    width: d. how: group_size, bits and mode of :func:`mlx.core.quantize`. Products with float32 are float32,
    whatever format the scales have.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    width: int
    how: dict[str, Any]

    dtype = mx.float32

    @property
    def shape(self) -> tuple[int, int]:
        """(V, d)."""
        return self.weight.shape[0], self.width

    def __getitem__(self, part: slice | mx.array) -> PackedHead:
        """The head of a part of the vocabulary."""
        biases = None if self.biases is None else self.biases[part]
        return replace(self, weight=self.weight[part], scales=self.scales[part], biases=biases)

    def dense(self) -> mx.array:
        """[V, d] float32."""
        found: mx.array = mx.dequantize(self.weight, self.scales, self.biases, **self.how)
        return found.astype(mx.float32)

    def logits(self, h: mx.array) -> mx.array:
        """[n, V] logits of hidden states h [n, d]."""
        return self._product(h, True)

    def to_hidden(self, grad: mx.array) -> mx.array:
        """[n, d] gradient with respect to hidden states, from the one with respect to logits [n, V]."""
        return self._product(grad, False)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        product: mx.array = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=transpose, **self.how
        )
        return product


def packed_head(layer: nn.Module) -> PackedHead:
    """The packed rows of a QuantizedLinear or QuantizedEmbedding."""
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    width = layer.weight.shape[1] * 32 // layer.bits
    return PackedHead(layer.weight, layer.scales, layer.get("biases"), width, how)
