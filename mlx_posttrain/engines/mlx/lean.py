"""A GPT-2 block that keeps less for the backward pass of large batches.

The backward pass of a block needs most intermediate arrays of its forward pass: about 25 numbers per token
and unit of width, and the attention weights, whose number grows with the square of the length. From
``LEAN_ABOVE`` bytes on, the block keeps what is expensive to compute again, the outputs of products with a
weight and of attention (10 numbers), and recomputes the rest: layer norms, the activation, the attention
weights. This is selective recomputation (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models", section 5). Unlike gradient checkpointing it repeats no product with a weight, since MLX
never evaluates an array that is not needed. It costs a tenth of a step of GPT-2 124M and a quarter of a step
of the embedded model, which is why small batches are left alone. mlx-lm's own block runs otherwise, and is
the reference in tests/engines/test_mlx_lean.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gpt2 import TransformerBlock

from mlx_posttrain.engines import sizes
from mlx_posttrain.engines.base import LEAN_ABOVE, block_bytes
from mlx_posttrain.engines.mlx import long_rows
from mlx_posttrain.engines.mlx.cpu import attention as mlx_attention


class LeanBlock(TransformerBlock):
    """mlx-lm's block: the same numbers, of which fewer are kept."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is not None or not self._lean(*x.shape[:2]):
            return super().__call__(x, mask, cache)
        attend = partial(self.attended, mask=mask)
        # neither the CPU's own attention nor one of a chunk of queries at a time keeps attention weights
        keeps_none = mlx_attention.applies(self.attn, mask, None) or (
            len(sizes.query_chunks(x.shape[0], self.n_head, x.shape[1])) > 1
        )
        return self._recomputing(x, attend if keeps_none else partial(_recomputed, [], attend))

    def with_attention(
        self, x: mx.array, attend: Callable[[mx.array], mx.array], rows: Sequence[int]
    ) -> mx.array:
        """The block on [..., P, d] with another attention between its products.

        attend: from queries, keys and values [..., P, 3 d] to [..., P, d]. rows: (B, T) of what it works on.
        """
        if self._lean(*rows):
            return self._recomputing(x, partial(_recomputed, [], attend))
        h = x + self.attn.c_proj(attend(self.attn.c_attn(self.ln_1(x))))
        return h + self.mlp(self.ln_2(h))

    def _lean(self, rows: int, length: int) -> bool:
        size = block_bytes(rows, length, self.n_embd, self.n_head)
        return self.training and size > sizes.scale() * LEAN_ABOVE

    def _recomputing(self, x: mx.array, attend: Callable[[mx.array], mx.array]) -> mx.array:
        attn, mlp = self.attn, self.mlp
        qkv = _recomputed([self.ln_1, attn.c_attn], lambda x: attn.c_attn(self.ln_1(x)), x)
        h = x + attn.c_proj(attend(qkv))
        inner = _recomputed([self.ln_2, mlp.c_fc], lambda h: mlp.c_fc(self.ln_2(h)), h)
        return h + _recomputed([mlp.c_proj], lambda inner: mlp.c_proj(_activation(mlp)(inner)), inner)

    def attended(self, qkv: mx.array, mask: Any) -> mx.array:
        """[B, T, d] what attention returns for queries, keys and values [B, T, 3 d]."""
        if mlx_attention.applies(self.attn, mask, None):
            return mlx_attention.causal(qkv, self.attn.n_head)
        return _attention(qkv, self.attn.n_head, self.attn.scale, mask)


def use_in(net: nn.Module) -> None:
    """Make a GPT-2 train with lean blocks."""
    for layer in net.layers:
        if type(layer) is TransformerBlock:
            layer.__class__ = LeanBlock


def undo(net: nn.Module) -> None:
    """Put mlx-lm's own blocks back.

    For dropout, which would draw another mask in the second computation, and where whole blocks are
    recomputed instead.
    """
    for layer in net.layers:
        if type(layer) is LeanBlock:
            layer.__class__ = TransformerBlock  # type: ignore[assignment]


def _recomputed(
    modules: Sequence[nn.Module], function: Callable[[mx.array], mx.array], x: mx.array
) -> mx.array:
    """``function(x)``, computed again in the backward pass; modules: those whose parameters it uses."""

    def inner(parameters: list[Any], x: mx.array) -> mx.array:
        for module, values in zip(modules, parameters, strict=True):
            module.update(values)
        return function(x)

    return mx.checkpoint(inner)([m.trainable_parameters() for m in modules], x)


def _attention(qkv: mx.array, heads: int, scale: float, mask: Any) -> mx.array:
    q, k, v = (mlx_attention.split_heads(part, heads) for part in mx.split(qkv, 3, axis=-1))
    return mlx_attention.join_heads(long_rows.attention(q, k, v, scale, mask))


def _activation(mlp: nn.Module) -> Callable[[mx.array], mx.array]:
    return getattr(mlp, "activation", nn.gelu_approx)
