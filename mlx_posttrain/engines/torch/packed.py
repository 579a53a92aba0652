"""Packed batches: rows in one piece, without padding, and with shared prefixes only once.

Completions of one prompt begin with the same tokens, and so do the two sides of a pair. A causal model
computes the same for the same prefix, so the shared part goes through every product with a weight once; only
attention works on whole rows. Tokens after the last position that is needed are left out. Exact: the same
numbers as from padded rows, up to the order of sums. Prefix sharing is known from inference (Juravsky et al.
2024, "Hydragen"); here gradients flow through it as well, and add up in the shared part.

GPT-2 only: other models may put a mask of their own between attention and its rows. Padded rows are the
reference in tests/engines/test_torch_packed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mlx_posttrain.data.batches import PACKING, layout

#: The name under which transformers finds this module's attention.
ATTENTION = "sdpa_packed"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B rows of T are in one packed row of P.

    tokens, positions: [1, P] ids, and positions within the original rows. place: [B, T] index into P of each
    row's tokens, 0 after a row's end. owner: [P] index into B * T, flattened, of one row's copy of a packed
    token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    place: torch.Tensor
    owner: torch.Tensor


def pack(tokens: np.ndarray, index: np.ndarray) -> Packing | None:
    """:func:`mlx_posttrain.data.batches.layout` of rows as tensors; None where packing does not pay."""
    found = layout(tokens, index, PACKING["torch"])
    if found is None:
        return None
    place, owner = found
    row, position = owner // place.shape[1], owner % place.shape[1]
    packed = torch.from_numpy(tokens[row, position].astype(np.int64))
    return Packing(
        packed[None], torch.from_numpy(position)[None], torch.from_numpy(place), torch.from_numpy(owner)
    )


def hidden(backbone: Callable[..., torch.Tensor], tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[N, d] hidden states at ``index`` of right-padded ``tokens`` [B, T].

    backbone: gives the hidden states at all ids, of a GPT-2 loaded with ``ATTENTION``.
    """
    packing = pack(tokens.numpy(), index.numpy())
    if packing is None:
        return backbone(tokens).flatten(0, 1)[index]
    # transformers takes a mask of four dimensions as it is, so no [P, P] mask is made, which nothing would
    # read.
    mask = torch.ones(1, 1, 1, 1)
    states = backbone(packing.tokens, position_ids=packing.positions, attention_mask=mask, packing=packing)[0]
    length = tokens.shape[1]
    return states[packing.place[index // length, index % length]]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention on packed rows.

    [1, heads, P, head] are spread out to [B, heads, T, head], and the output is gathered again.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    flat = packing.place.flatten()

    def rows(x: torch.Tensor) -> torch.Tensor:
        spread = x[0].transpose(0, 1).flatten(1).index_select(0, flat)
        return spread.view(*packing.place.shape, *x.shape[1::2]).transpose(1, 2)

    output, _ = sdpa_attention_forward(
        module, rows(query), rows(key), rows(value), None, **kwargs | {"is_causal": True}
    )
    return output.flatten(0, 1).index_select(0, packing.owner)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
