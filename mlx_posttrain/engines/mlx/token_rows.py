"""New rows of an embedding and its head on MLX: grown tables, and rows trained beside an adapter.

A grown table has more rows, which are like the others. Beside an adapter the tables are frozen, and the rows
of the new tokens are a parameter ``rows`` [n, d] of their layers, as in PEFT: a tied head is its embedding,
and a head that is not tied has rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_posttrain.convert import names
from mlx_posttrain.convert.token_rows import EMBEDDINGS, NOT_PLAIN, TokenRows, grow
from mlx_posttrain.errors import UserError


class _Rows(nn.Module):
    """What a layer with trained rows has beside its frozen weight.

    _index: [n] ids of the rows. _slot: [V] number of each id's row, -1 for the others. _on: False while
    adapters are off.
    """

    weight: mx.array
    rows: mx.array
    _index: mx.array
    _slot: mx.array
    _on: bool

    def put(self, logits: mx.array, x: mx.array) -> mx.array:
        """Logits [..., V] of hidden states x with those of the rows' tokens in their places."""
        if self._on:
            logits[..., self._index] = x @ self.rows.astype(x.dtype).T
        return logits

    def whole(self) -> mx.array:
        """[V, d] the weight with the rows in it, without gradient."""
        weight = mx.stop_gradient(self.weight)
        if self._on:
            weight[self._index] = mx.stop_gradient(self.rows).astype(weight.dtype)
        return weight


class RowEmbedding(_Rows, nn.Embedding):
    """An embedding with trained rows, which is its head too where that is tied."""

    def __call__(self, x: mx.array) -> mx.array:
        plain: mx.array = nn.Embedding.__call__(self, x)
        if not self._on:
            return plain
        slot = self._slot[x]
        found = mx.stop_gradient(self.rows)[mx.maximum(slot, 0)]
        # What is added is zero. Its gradient is a product, where a gather's would be a sum in no fixed order.
        chosen = (slot[..., None] == mx.arange(len(self._index))).astype(self.rows.dtype)
        found = found + chosen @ (self.rows - mx.stop_gradient(self.rows))
        return mx.where((slot >= 0)[..., None], found.astype(plain.dtype), plain)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.put(nn.Embedding.as_linear(self, x), x)


class RowLinear(_Rows, nn.Linear):
    """A head that is not tied, with trained rows."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.put(nn.Linear.__call__(self, x), x)


def tables(net: nn.Module) -> tuple[str, nn.Module, nn.Module | None]:
    """(path, layer) of the embedding, and the head's layer where it is not tied.

    Raises UserError for an architecture without one of the names that are known.
    """
    inner = getattr(net, "model", None)
    name = next((name for name in EMBEDDINGS if inner is not None and name in inner), None)
    if inner is None or name is None:
        raise UserError("mlx-lm does not name this architecture's embedding, so it can have no new tokens")
    return f"model.{name}", inner[name], net.lm_head if "lm_head" in net else None


def _layers(net: nn.Module) -> list[nn.Module]:
    _, embedding, head = tables(net)
    found = [embedding] if head is None else [embedding, head]
    if any("scales" in layer for layer in found):
        raise UserError(
            "the embedding is quantised and can have no new tokens: start from the weights before "
            "quantising, with adapter.quantize, which leaves the embedding as it is"
        )
    return found


def enlarge(net: nn.Module, vocabulary: int) -> None:
    """Give embedding and head at least ``vocabulary`` rows. Raises UserError where they are quantised."""
    if vocabulary <= tables(net)[1].weight.shape[0]:
        return
    for layer in _layers(net):
        for name in ("weight", "bias"):
            if name in layer:
                old = layer[name]
                grown = grow(np.array(old.astype(mx.float32)), vocabulary)
                layer[name] = mx.concatenate([old, mx.array(grown[len(old) :]).astype(old.dtype)])


def add(net: nn.Module, tokens: Sequence[int]) -> None:
    """Make the rows of ``tokens`` trained parameters of a frozen network; they start as they are.

    Raises UserError for tables that are quantised, and for others that are not one plain matrix.
    """
    index = mx.array(tokens)
    for layer in _layers(net):
        if not isinstance(layer, nn.Linear | nn.Embedding) or "bias" in layer:
            raise UserError(NOT_PLAIN)
        slot = np.full(layer.weight.shape[0], -1, np.int32)
        slot[list(tokens)] = np.arange(len(tokens))
        kind = RowLinear if isinstance(layer, nn.Linear) else RowEmbedding
        # An embedding of its own kind calls the plain one, which is that with the rows here.
        plain = type(layer) in (nn.Linear, nn.Embedding)
        layer.__class__ = kind if plain else type(kind.__name__, (type(layer), kind), {})
        layer._on, layer._index, layer._slot = True, index, mx.array(slot)
        layer.rows = layer.weight[index].astype(mx.float32)


def active(layer: nn.Module) -> bool:
    """Whether a layer has trained rows that are not off."""
    return isinstance(layer, _Rows) and layer._on


def trained(net: nn.Module) -> list[_Rows]:
    """The layers that have trained rows: the embedding, then a head that is not tied."""
    found = [module for _, module in net.named_modules() if isinstance(module, _Rows)]
    return sorted(found, key=lambda layer: isinstance(layer, nn.Linear))


@contextmanager
def off(net: nn.Module) -> Iterator[None]:
    """A context in which the layers compute what they did before training."""
    layers = trained(net)
    for layer in layers:
        layer._on = False
    try:
        yield
    finally:
        for layer in layers:
            layer._on = True


def fold(net: nn.Module) -> None:
    """Put the trained rows into their tables for good."""
    for layer in trained(net):
        layer.weight = layer.whole()
        layer._on = False
        del layer["rows"]


def read(net: nn.Module, model_type: str) -> TokenRows | None:
    """The trained rows; None where there are none."""
    layers = trained(net)
    if not layers:
        return None
    found = [np.array(layer.rows) for layer in layers]
    ids = tuple(np.array(layers[0]._index).tolist())
    return TokenRows(ids, names.hf_path(tables(net)[0], model_type), found[0], (*found, None)[1])


def write(net: nn.Module, rows: TokenRows) -> None:
    """Set the trained rows; where ``rows`` has none of the head, those are the table's."""
    for layer, new in zip(trained(net), (rows.embedding, rows.head), strict=False):
        layer.rows = (
            layer.weight[layer._index].astype(mx.float32)
            if new is None
            else mx.array(np.ascontiguousarray(new))
        )
