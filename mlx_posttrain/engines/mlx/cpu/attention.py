"""GPT-2's attention in training for MLX's CPU backend on Linux.

That backend's softmax computes exp one element at a time and takes as long as half of a block's products with
weights. This one uses the vectorised exp of engines/mlx/cpu/exp.py. Its backward pass recomputes the
attention weights, whose number grows with the square of the length, from queries and keys instead of keeping
them; in place of the row sums of P * dP it uses those of O * dO (Dao et al. 2022, "FlashAttention", appendix
B.2). mlx-lm's own attention stays on other devices, in decoding and under padding masks, and is the reference
in tests/engines/test_mlx_attention.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gpt2 import Attention

from mlx_posttrain.engines.mlx.cpu.exp import exp_below, is_scalar

#: Added to the scores of later positions, for which exp_below then gives 0.
MASKED = -1e9


def split_heads(x: mx.array, heads: int) -> mx.array:
    """[B, T, heads * d] to [B, heads, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: mx.array) -> mx.array:
    """[B, heads, T, d] to [B, T, heads * d]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _scores(q: mx.array, k: mx.array) -> mx.array:
    """q k' with later positions masked, [B, heads, T, T]."""
    length = q.shape[2]
    mask = mx.where(mx.tril(mx.ones((length, length))) > 0, 0.0, MASKED)
    return mx.addmm(mask, q, k.swapaxes(-1, -2))


def _minus_row(a: mx.array, row: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Factors whose product is a b' - row, with ``row`` [B, heads, T, 1] subtracted from every column.

    Compiled MLX broadcasts slowly, hence the subtraction within the product.
    """
    return mx.concatenate([a, -row], axis=-1), mx.concatenate([b, mx.ones((*b.shape[:-1], 1))], axis=-1)


@cache
def _attention(heads: int) -> Any:
    def parts(qkv: mx.array) -> list[mx.array]:
        # Slices, since mx.compile (0.32) fails on mx.split of an array that an adapter has added to.
        width = qkv.shape[-1] // 3
        q, k, v = (
            split_heads(qkv[..., begin : begin + width], heads) for begin in range(0, 3 * width, width)
        )
        return [q * q.shape[-1] ** -0.5, k, v]

    # Returns the output and the log-sum-exp of every row of scores.
    @mx.custom_function
    def attention(qkv: mx.array) -> tuple[mx.array, mx.array]:
        q, k, v = parts(qkv)
        scores = _scores(q, k)
        top = mx.max(scores, axis=-1, keepdims=True)
        e = exp_below(scores, top)
        total = mx.sum(e, axis=-1, keepdims=True)
        return join_heads((e @ v) / total), top + mx.log(total)

    @attention.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        q, k, v = parts(primals[0] if isinstance(primals, list | tuple) else primals)
        d_o, o = split_heads(cotangents[0], heads), split_heads(outputs[0], heads)
        p = exp_below(_scores(*_minus_row(q, outputs[1], k)), mx.array(0.0))
        a, b = _minus_row(d_o, mx.sum(d_o * o, axis=-1, keepdims=True), v)
        d_s = p * (a @ b.swapaxes(-1, -2))
        d_q, d_k, d_v = (d_s @ k) * q.shape[-1] ** -0.5, d_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_o
        return mx.concatenate([join_heads(d) for d in (d_q, d_k, d_v)], axis=-1)

    return attention


def causal(qkv: mx.array, heads: int) -> mx.array:
    """Causal self-attention scaled by d**-0.5 (Vaswani et al. 2017, equation 1), float32.

    qkv: queries, keys and values of all heads, concatenated, [B, T, 3 * heads * d]. Returns [B, T, heads *
    d]. The backward pass recomputes the attention weights from queries, keys and each row's log-sum-exp (Dao
    et al. 2022, algorithm 4, without its tiles).
    """
    output: mx.array = _attention(heads)(qkv)[0]
    return output


class CausalAttention(Attention):
    """mlx-lm's attention: the same numbers, faster."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not applies(self, mask, cache):
            return super().__call__(x, mask, cache)
        return self.c_proj(causal(self.c_attn(x), self.n_head))


def applies(attention: Attention, mask: Any, cache: Any) -> bool:
    """Whether ``causal`` is what this attention computes.

    That is: no cache, a mask of later positions only, and a scale of d**-0.5.
    """
    return (
        isinstance(attention, CausalAttention)
        and cache is None
        and isinstance(mask, str)
        and mask == "causal"
        and attention.scale == attention.head_dim**-0.5
    )


def use_in(net: nn.Module) -> None:
    """Give a float32 GPT-2 this attention where MLX computes exp one element at a time.

    Nothing else of the model changes.
    """
    if not is_scalar():
        return
    for module in net.modules():
        if type(module) is Attention:
            module.__class__ = CausalAttention
