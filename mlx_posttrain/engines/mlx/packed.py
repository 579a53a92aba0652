"""Packed batches on MLX: GPT-2's rows in one piece, without padding, and with shared beginnings only once.

What engines/torch/packed.py does, for mlx-lm's GPT-2 in engines/mlx/lean.py's blocks: products with weights
see each token of a shared beginning once, and attention works on whole rows, so no row sees another. Exact up
to the order of sums. Gradients of what several rows share are gathered and added in a fixed order; a scatter,
which MLX would make of an index, adds in any order on a GPU. Other architectures, whose blocks are mlx-lm's
own, and dropout are left alone. Padded rows are the reference in tests/engines/test_mlx_packed.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_posttrain.data.batches import PACKING, Batch, layout, padded_length, round_up
from mlx_posttrain.engines.mlx.lean import LeanBlock

#: Where a batch's packing is in ``DeviceBatch.extra``: names of :func:`arrays` behind this.
PREFIX = "packed."
#: Shared tokens are padded to a multiple, so that fewer shapes are compiled.
SHARED_MULTIPLE = 256


def applies(net: nn.Module) -> bool:
    """Whether all of a network's blocks are those that read packed rows."""
    layers = getattr(net, "layers", [])
    return bool(layers) and all(type(layer) is LeanBlock for layer in layers)


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """What :func:`hidden` reads of a batch, by name; {} where packing does not pay.

    P packed tokens, of which S are in several rows; B rows of T; N outputs. tokens, positions: [P]. rows:
    [B, T] index into P. owner: [P] a row's copy of each token, as an index into B * T. owned: [B, T] 1 where
    that is the copy. output: [N] index into P. The rest is for gradients, see :func:`_copies`.
    """
    found = layout(batch.tokens, batch.index, PACKING["mlx"])
    if found is None:
        return {}
    place, owner = found
    count, short, length = *place.shape, batch.tokens.shape[1]
    size, width = round_up(len(owner), PACKING["mlx"].multiple), padded_length(short)
    rows = np.zeros((count, width), np.int32)
    rows[:, :short] = place
    row, position = owner // short, owner % short
    tokens, positions = np.zeros((2, size), np.int32)
    tokens[: len(owner)], positions[: len(owner)] = batch.tokens[row, position], position
    ends = np.zeros(count, int)
    np.maximum.at(ends, batch.index // length, batch.index % length + 1)
    real = np.arange(width) < ends[:, None]
    output = place[batch.index // length, batch.index % length].astype(np.int32)
    of_rows, of_output = _copies(rows, real, size), _copies(output, batch.mask > 0, size)
    owned = of_rows["first"][rows] == np.arange(rows.size).reshape(rows.shape)
    return {
        PREFIX + name: value
        for name, value in {
            "tokens": tokens,
            "positions": positions,
            "rows": rows,
            "owned": (owned & real).astype(np.int32),
            "output": output,
            **{f"rows.{name}": value for name, value in of_rows.items()},
            **{f"output.{name}": value for name, value in of_output.items()},
        }.items()
    }


def _copies(index: np.ndarray, real: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Where each of ``size`` tokens is in an index of them, as a gradient gathers it.

    first: [size] the first place in the flattened index, its length for a token without any. more: [size] the
    token's row in copies, their number for a token with one place. copies: [S, C] all other places, padded
    with the index's length. real: [...] whether a place counts.
    """
    places = np.flatnonzero(real.ravel())
    tokens = index.ravel()[places]
    order = np.argsort(tokens, kind="stable")
    places, tokens = places[order], tokens[order]
    known, begin, counts = np.unique(tokens, return_index=True, return_counts=True)
    first = np.full(size, index.size, np.int32)
    first[known] = places[begin]
    shared = known[counts > 1]
    most = 2 ** max(2, (int(counts.max(initial=1)) - 2).bit_length())
    copies = np.full((round_up(max(len(shared), 1), SHARED_MULTIPLE), most), index.size, np.int32)
    more = np.full(size, len(copies), np.int32)
    more[shared] = np.arange(len(shared))
    rank = np.arange(len(tokens)) - np.repeat(begin, counts)
    later = rank > 0
    copies[more[tokens[later]], rank[later] - 1] = places[later]
    return {"first": first, "more": more, "copies": copies}


def hidden(backbone: nn.Module, extra: dict[str, mx.array]) -> mx.array:
    """[N, d] hidden states at the outputs of a packed batch.

    backbone: mlx-lm's GPT2Model with lean blocks; extra: DeviceBatch.extra of a batch with :func:`arrays`.
    """
    packing = {name.removeprefix(PREFIX): v for name, v in extra.items() if name.startswith(PREFIX)}
    x = (backbone.wte(packing["tokens"]) + backbone.wpe(packing["positions"]))[None]
    rows = packing["rows"]
    for layer in backbone.h:
        x = layer.with_attention(x, partial(_attention, layer, packing), rows.shape)
    tables = (packing[f"output.{name}"] for name in ("first", "more", "copies"))
    return _spread(backbone.ln_f(x)[0], packing["output"], *tables)


def _attention(layer: LeanBlock, packing: dict[str, mx.array], qkv: mx.array) -> mx.array:
    """[1, P, d] what attention within rows returns for [1, P, 3 d] queries, keys and values."""
    tables = (packing[f"rows.{name}"] for name in ("first", "more", "copies"))
    attended = layer.attended(_spread(qkv[0], packing["rows"], *tables), "causal")
    return _collect(attended, packing["rows.first"], packing["rows"], packing["owned"])[None]


@mx.custom_function
def _spread(x: mx.array, index: mx.array, first: mx.array, more: mx.array, copies: mx.array) -> mx.array:
    """``x[index]``, [..., d] of [P, d]."""
    return x[index]


@_spread.vjp
def _spread_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    _, index, first, more, copies = primals
    flat = _with_zero(cotangent.reshape(-1, cotangent.shape[-1]))
    gradient = flat[first] + _with_zero(flat[copies].sum(1))[more]
    return gradient, *(mx.zeros_like(table) for table in (index, first, more, copies))


@mx.custom_function
def _collect(x: mx.array, owner: mx.array, rows: mx.array, owned: mx.array) -> mx.array:
    """[P, d] each token's own copy of [B, T, d]; 0 for a token that only pads."""
    return _with_zero(x.reshape(-1, x.shape[-1]))[owner]


@_collect.vjp
def _collect_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    _, owner, rows, owned = primals
    gradient = cotangent[rows] * owned[..., None].astype(cotangent.dtype)
    return gradient, *(mx.zeros_like(table) for table in (owner, rows, owned))


def _with_zero(x: mx.array) -> mx.array:
    """[n + 1, d]: a row of zeros behind the others, for indices that mean none."""
    return mx.concatenate([x, mx.zeros((1, x.shape[-1]), x.dtype)])
