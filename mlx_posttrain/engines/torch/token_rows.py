"""New rows of an embedding and its head on torch; engines/mlx/token_rows.py says how.

PEFT has layers for this as well, which copy the whole table in every call and take a gradient of all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mlx_posttrain.convert.token_rows import NOT_PLAIN, TokenRows, grow
from mlx_posttrain.errors import UserError


class _Rows(torch.nn.Module):
    """What a layer with trained rows has beside its frozen weight.

    rows: [n, d], of a tied head those of the embedding. index: [n] ids of the rows. slot: [V] number of each
    id's row, -1 for the others. on: False while adapters are off.
    """

    weight: torch.Tensor
    rows: torch.nn.Parameter
    index: torch.Tensor
    slot: torch.Tensor
    on: bool

    @torch.no_grad()
    def whole(self) -> torch.Tensor:
        """[V, d] the weight with the rows in it, without gradient."""
        weight = self.weight.detach()
        return weight.index_copy(0, self.index, self.rows.to(weight.dtype)) if self.on else weight


class RowEmbedding(_Rows, torch.nn.Embedding):
    """An embedding with trained rows."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        plain = torch.nn.Embedding.forward(self, tokens)
        if not self.on:
            return plain
        slot = self.slot[tokens]
        found = torch.nn.functional.embedding(slot.clamp(min=0), self.rows).to(plain.dtype)
        return torch.where((slot >= 0)[..., None], found, plain)


class RowLinear(_Rows, torch.nn.Linear):
    """A head with trained rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.Linear.forward(self, x)
        if not self.on:
            return logits
        return logits.index_copy(-1, self.index, torch.nn.functional.linear(x, self.rows.to(x.dtype)))


@torch.no_grad()
def enlarge(net: Any, vocabulary: int) -> None:
    """Give embedding and head at least ``vocabulary`` rows."""
    layer = net.get_input_embeddings()
    if vocabulary <= len(layer.weight):
        return
    state = torch.get_rng_state()  # transformers draws rows that are overwritten here
    old = {id(p): p.detach().clone() for p in _tables(net)}
    ids = [id(p) for p in _tables(net)]
    net.resize_token_embeddings(vocabulary, mean_resizing=False)
    torch.set_rng_state(state)
    for table, before in zip(_tables(net), (old[i] for i in ids), strict=True):
        new = grow(before.float().numpy(), vocabulary)[len(before) :]
        table[: len(before)] = before
        table[len(before) :] = torch.from_numpy(np.ascontiguousarray(new)).to(table.dtype)


def _tables(net: Any) -> list[torch.nn.Parameter]:
    """Weights, and the head's bias, with a row for each token; a tied one once."""
    head = net.get_output_embeddings()
    found = [net.get_input_embeddings().weight]
    found += [] if head is None or head.weight is found[0] else [head.weight]
    return found + ([] if head is None or head.bias is None else [head.bias])


def add(net: Any, tokens: Sequence[int]) -> None:
    """Make the rows of ``tokens`` trained parameters of a frozen network; they start as they are.

    Raises UserError for tables that are not one plain matrix.
    """
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    plain_head = type(head) is torch.nn.Linear and head.bias is None
    if not plain_head or not isinstance(embedding, torch.nn.Embedding):
        raise UserError(NOT_PLAIN)
    index = torch.tensor(tokens)
    for layer, kind in ((embedding, RowEmbedding), (head, RowLinear)):
        # An embedding of its own kind calls the plain one, which is that with the rows here.
        plain = type(layer) in (torch.nn.Linear, torch.nn.Embedding)
        layer.__class__ = kind if plain else type(kind.__name__, (type(layer), kind), {})
        layer.on, layer.index = True, index
        layer.slot = torch.full((len(layer.weight),), -1)
        layer.slot[index] = torch.arange(len(index))
        tied = layer is head and head.weight is embedding.weight
        layer.rows = (
            embedding.rows if tied else torch.nn.Parameter(layer.weight.detach()[index].float().clone())
        )


def trained(net: Any) -> list[Any]:
    """The layers that have trained rows: the embedding and the head."""
    found = [net.get_input_embeddings(), net.get_output_embeddings()]
    return [layer for layer in found if isinstance(layer, _Rows)]


@contextmanager
def off(net: Any) -> Iterator[None]:
    """A context in which the layers compute what they did before training."""
    layers = trained(net)
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def read(net: Any) -> TokenRows | None:
    """The trained rows; None where there are none."""
    layers = trained(net)
    if not layers:
        return None
    embedding, head = layers
    path = next(name for name, module in net.named_modules() if module is embedding)
    found = [layer.rows.detach().numpy() for layer in layers]
    tied = head.rows is embedding.rows
    return TokenRows(tuple(embedding.index.tolist()), path, found[0], None if tied else found[1])


@torch.no_grad()
def write(net: Any, rows: TokenRows) -> None:
    """Set the trained rows; where ``rows`` has none of the head, those are the table's."""
    embedding, head = trained(net)
    embedding.rows.copy_(torch.tensor(rows.embedding))
    if head.rows is not embedding.rows:
        head.rows.copy_(head.weight[head.index] if rows.head is None else torch.tensor(rows.head))
