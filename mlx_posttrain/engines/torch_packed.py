"""Rows of a batch in one piece, without padding, and what several of them begin with only once.

Answers to one prompt begin with the same tokens, and so do the two sides of a pair. A causal model computes the same for the same beginning,
so the shared part goes through every product with a weight once; attention alone still sees whole rows. Tokens behind the last position
that anybody asks for are left out. Exact: the same numbers as from padded rows, but for the order of sums. Prefix sharing is known from
inference (Juravsky et al. 2024, "Hydragen"); here gradients flow through it as well, and add up in the shared part.

GPT-2 only: other models may put a mask of their own between attention and its rows. tests/engines/test_torch_packed.py holds it against
padded rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "sdpa_packed"  # the name that transformers knows this file's attention by
WORTHWHILE = 0.95  # of the padded tokens: packing more than that gains less than gathering rows costs


@dataclass(frozen=True)
class Packing:
    """Where B rows of T tokens lie in one row of P.

    tokens, positions: [1, P] ids and places in their own row. place: [B, T] of each row's tokens in P, 0 behind a row's end. owner: [P]
    index into B * T, flattened, of one row's copy of a packed token.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    place: torch.Tensor
    owner: torch.Tensor


def pack(tokens: np.ndarray, index: np.ndarray) -> Packing | None:
    """How rows pack when ``index`` says which outputs are wanted; None where it would not pay.

    tokens: [B, T] right-padded ids; index: [N] into B * T, flattened. A row shares its beginning with the earlier row that it has most in
    common with: a template with all rows, and behind it a prompt with the other answers to it.
    """
    rows, width = tokens.shape
    needed = np.zeros(rows, int)
    np.maximum.at(needed, index // width, index % width + 1)
    place = np.zeros((rows, needed.max()), np.int64)
    owner: list[int] = []
    for r, n in enumerate(needed):
        shared = 0
        if r:
            differs = tokens[:r] != tokens[r]
            alike = np.where(differs.any(1), differs.argmax(1), width)
            common = np.minimum(np.minimum(alike, needed[:r]), n)
            nearest = int(common.argmax())
            shared = int(common[nearest])
            place[r, :shared] = place[nearest, :shared]
        place[r, shared:n] = np.arange(len(owner), len(owner) + n - shared)
        owner += [r * place.shape[1] + t for t in range(shared, n)]
    if len(owner) > WORTHWHILE * tokens.size:
        return None
    flat = np.array(owner)
    own_row, position = flat // place.shape[1], flat % place.shape[1]
    packed, positions, where, owners = (torch.from_numpy(a.astype(np.int64)) for a in (tokens[own_row, position], position, place, flat))
    return Packing(packed[None], positions[None], where, owners)


def hidden(backbone: Any, tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[N, d] outputs of a GPT-2 backbone, loaded with ``ATTENTION``, at ``index`` of [B, T] right-padded ``tokens``."""
    packing = pack(tokens.numpy(), index.numpy())
    if packing is None:
        return backbone(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)[index]
    made = torch.ones(1, 1, 1, 1)  # a mask of four dimensions is taken for finished, and no [P, P] is made that nobody reads
    found = backbone(
        input_ids=packing.tokens, position_ids=packing.positions, attention_mask=made, use_cache=False, packing=packing
    ).last_hidden_state[0]
    width = tokens.shape[1]
    return found[packing.place[index // width, index % width]]


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    packing: Packing | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention of packed rows: [1, heads, P, head] are spread out to [B, heads, T, head] and gathered again."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    flat = packing.place.flatten()

    def rows(x: torch.Tensor) -> torch.Tensor:
        spread = x[0].transpose(0, 1).flatten(1).index_select(0, flat)
        return spread.view(*packing.place.shape, *x.shape[1::2]).transpose(1, 2)

    seen, _ = sdpa_attention_forward(module, rows(query), rows(key), rows(value), None, **kwargs | {"is_causal": True})
    return seen.flatten(0, 1).index_select(0, packing.owner)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
