"""Attention of long rows, a chunk of queries at a time.

In training MLX computes attention from all attention weights, a number for each head and pair of positions,
and keeps them for the backward pass. From ``sizes.ATTENTION_ABOVE`` on a chunk of queries is taken at a time,
with those keys that it sees, and the backward pass computes the chunk's attention again (Rabe and Staats
2021, "Self-attention Does Not Need O(n^2) Memory", with one chunk of keys). Numbers are those of the stock
attention, which short rows keep and which is the reference in tests/engines/test_long_rows.py.
"""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_posttrain.engines import sizes
from mlx_posttrain.engines.mlx import device

#: The function of mlx_lm.models.base through which its models attend.
_STOCK = "scaled_dot_product_attention"


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention [B, heads, T, d] of queries to the keys [B, key heads, T, d] of the same positions.

    mask: "causal", None, or a boolean array [..., T, T] of the pairs that count.
    """
    parts = sizes.query_chunks(*q.shape[:3])
    if len(parts) == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    causal = isinstance(mask, str)

    def attend(part: slice, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        seen = mask if causal or mask is None else mask[..., part, :]
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)

    def cut(part: slice, arrays: Any, after: list[mx.array]) -> list[mx.array]:
        """A chunk's queries and the keys and values that it sees, when ``after`` is there."""
        q, k, v = arrays
        seen = slice(0, part.stop if causal else None)
        chunk = [q[:, :, part], k[:, :, seen], v[:, :, seen]]
        return mx.depends(chunk, after) if after else chunk

    @mx.custom_function
    def chunked(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        found: list[mx.array] = []
        for part in parts:
            found.append(attend(part, *cut(part, (q, k, v), found[-1:])))
        return mx.concatenate(found, axis=2)

    @chunked.vjp
    def chunked_vjp(primals: Any, cotangent: mx.array, _: Any) -> list[mx.array]:
        d_q: list[mx.array] = []
        d_kv: list[mx.array] = []
        for part in reversed(parts):  # the last one sees all keys
            # After all three: a gradient of queries that is left for later would keep its chunk's weights.
            chunk = cut(part, primals, [*d_q[:1], *d_kv])
            _, (d, *parts_kv) = mx.vjp(partial(attend, part), chunk, [cotangent[:, :, part]])
            d_q.insert(0, d)
            found = [one.astype(mx.float32) for one in parts_kv]
            seen = slice(0, found[0].shape[2])
            d_kv = [sums.at[:, :, seen].add(one) for sums, one in zip(d_kv, found, strict=False)] or found
        return [mx.concatenate(d_q, axis=2), *(one.astype(k.dtype) for one in d_kv)]

    result: Any = chunked(q, k, v)
    return result


def use_in(net: nn.Module) -> None:
    """Make every attention layer of a network that calls mlx-lm's function take long rows in chunks.

    Done per instance: other networks of the process keep the stock function.
    """
    for module in net.modules():
        code = getattr(type(module).__call__, "__code__", None)
        if code is not None and _STOCK in code.co_names:
            module.__class__ = chunking(type(module))


@cache
def chunking(base: type) -> type:
    """A class like ``base``, of layers that attend through mlx-lm's function, with chunks in long rows."""
    call = base.__call__
    assert isinstance(call, FunctionType)
    names = {**call.__globals__, _STOCK: partial(_attention, call.__globals__[_STOCK])}
    instead = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    instead.__kwdefaults__ = call.__kwdefaults__

    class Chunking(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # A GPU has a kernel without gradients that keeps no attention weights.
            stock = device.on_gpu() and not self.training
            return (call if stock else instead)(self, *args, **kwargs)

    Chunking.__name__ = base.__name__
    return Chunking


def _attention(
    stock: Any, q: mx.array, k: mx.array, v: mx.array, cache: Any, scale: float, mask: Any, **further: Any
) -> mx.array:
    """mlx-lm's function, with chunks where it is the attention of whole rows, as of prompts that are read."""
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    other = added or hasattr(cache, "bits") or any(value is not None for value in further.values())
    if other or q.shape[2] != k.shape[2]:
        result: mx.array = stock(q, k, v, cache=cache, scale=scale, mask=mask, **further)
        return result
    return attention(q, k, v, scale, mask)
