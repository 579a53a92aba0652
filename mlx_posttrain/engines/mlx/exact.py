"""Parts of mlx-lm's models that round or approximate what transformers computes, or fail, mended."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2, gemma3_text, gpt_neox


class ExactMLP(gpt_neox.MLP):
    """GPT-NeoX's feed-forward layer with the error function, where mlx-lm's has its tanh approximation."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.dense_4h_to_h(nn.gelu(self.dense_h_to_4h(x)))


class BatchedAttention(gemma2.Attention):
    """Gemma 2's attention for several rows: mlx-lm's lays masks [B, 1, T, S] over its groups for one only."""

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        if self.repeats > 1 and mask is not None and mask.ndim == 4:
            mask = mask[:, :, None]
        return super().__call__(x, mask, cache)


class ScaledEmbedding(nn.Embedding):
    """Gemma 3's embedding, whose factor sqrt(d) mlx-lm rounds to bfloat16 whatever the weights are."""

    def __call__(self, x: mx.array) -> mx.array:
        rows = super().__call__(x)
        scale = self.weight.shape[-1] ** 0.5
        rounded = mx.array(scale, mx.bfloat16).astype(rows.dtype)
        return rows * (mx.array(scale, rows.dtype) / rounded)


def use_in(net: nn.Module, config: dict[str, Any]) -> None:
    """Put the exact parts into a network, where its config.json asks for them."""
    exact = config.get("hidden_act", "gelu") == "gelu"
    for module in net.modules():
        if type(module) is gpt_neox.MLP and exact:
            module.__class__ = ExactMLP
        elif type(module) is gemma2.Attention:
            module.__class__ = BatchedAttention
        elif type(module) is gemma3_text.Gemma3Model and type(module.embed_tokens) is nn.Embedding:
            module.embed_tokens.__class__ = ScaledEmbedding
