"""GPT-2's attention in training for MLX's CPU backend on Linux.

That backend's softmax computes exp one element at a time and takes as long as half of a block's products with
weights. This one uses the vectorised exp of engines/mlx/cpu/exp.py. Its backward pass recomputes the
attention weights, whose number grows with the square of the length, from queries and keys instead of keeping
them; in place of the row sums of P * dP it uses those of O * dO (Dao et al. 2022, "FlashAttention", appendix
B.2). Long rows take a chunk of queries at a time, as in engines/mlx/long_rows.py. mlx-lm's own attention
stays on other devices, in decoding and under padding masks, and is the reference in
tests/engines/test_mlx_attention.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gpt2 import Attention

from mlx_posttrain.engines import sizes
from mlx_posttrain.engines.mlx.cpu.exp import exp_below, is_scalar
from mlx_posttrain.engines.mlx.long_rows import chunking

#: Added to the scores of later positions, for which exp_below then gives 0.
MASKED = -1e9


def split_heads(x: mx.array, heads: int) -> mx.array:
    """[B, T, heads * d] to [B, heads, T, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: mx.array) -> mx.array:
    """[B, heads, T, d] to [B, T, heads * d]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def _scores(q: mx.array, k: mx.array) -> mx.array:
    """q k' with later positions masked, [B, heads, t, T], of the last t of T positions."""
    queries, keys = q.shape[2], k.shape[2]
    mask = mx.where(mx.tril(mx.ones((queries, keys)), keys - queries) > 0, 0.0, MASKED)
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

    def cut(part: slice, arrays: list[mx.array], after: list[mx.array]) -> list[mx.array]:
        """A chunk's part of the first arrays, and of the last two the keys and values that it sees."""
        *rows, k, v = arrays
        chunk = [*(a[:, :, part] for a in rows), k[:, :, : part.stop], v[:, :, : part.stop]]
        return mx.depends(chunk, after) if after else chunk

    # Returns the output and the log-sum-exp of every row of scores.
    @mx.custom_function
    def attention(qkv: mx.array) -> tuple[mx.array, mx.array]:
        arrays = parts(qkv)
        outputs: list[mx.array] = []
        lse: list[mx.array] = []
        for part in sizes.query_chunks(*arrays[0].shape[:3]):
            q, k, v = cut(part, arrays, outputs[-1:])
            scores = _scores(q, k)
            top = mx.max(scores, axis=-1, keepdims=True)
            e = exp_below(scores, top)
            total = mx.sum(e, axis=-1, keepdims=True)
            outputs.append((e @ v) / total)
            lse.append(top + mx.log(total))
        return join_heads(mx.concatenate(outputs, axis=2)), mx.concatenate(lse, axis=2)

    @attention.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        q, k, v = parts(primals[0] if isinstance(primals, list | tuple) else primals)
        rows = [q, split_heads(cotangents[0], heads), split_heads(outputs[0], heads), outputs[1]]
        d_q: list[mx.array] = []
        d_kv: list[mx.array] = []
        for part in reversed(sizes.query_chunks(*q.shape[:3])):  # the last one sees all keys
            q, d_o, o, lse, seen_k, seen_v = cut(part, [*rows, k, v], d_kv)
            p = exp_below(_scores(*_minus_row(q, lse, seen_k)), mx.array(0.0))
            a, b = _minus_row(d_o, mx.sum(d_o * o, axis=-1, keepdims=True), seen_v)
            d_s = p * (a @ b.swapaxes(-1, -2))
            d_q.insert(0, (d_s @ seen_k) * q.shape[-1] ** -0.5)
            found = [d_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_o]
            d_kv = [
                sums.at[:, :, : part.stop].add(one) for sums, one in zip(d_kv, found, strict=False)
            ] or found
        return mx.concatenate([join_heads(d) for d in (mx.concatenate(d_q, axis=2), *d_kv)], axis=-1)

    return attention


def causal(qkv: mx.array, heads: int) -> mx.array:
    """Causal self-attention scaled by d**-0.5 (Vaswani et al. 2017, equation 1), float32.

    qkv: queries, keys and values of all heads, concatenated, [B, T, 3 * heads * d]. Returns [B, T, heads *
    d]. The backward pass recomputes the attention weights from queries, keys and each row's log-sum-exp (Dao
    et al. 2022, algorithm 4, with chunks of queries only).
    """
    output: mx.array = _attention(heads)(qkv)[0]
    return output


class CausalAttention(chunking(Attention)):  # type: ignore[misc]
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
