"""How a loss per token becomes one number: by tokens, or by completions, under verl's names.

    token-mean               every token of the step counts alike (DAPO)
    seq-mean-token-mean      every completion counts alike (GRPO): a long one's tokens count less
    seq-mean-token-sum       every completion's sum
    seq-mean-token-sum-norm  every completion's sum, divided by the longest length allowed (Dr. GRPO)

The mean is over all tokens, or completions, of an optimizer step, not of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from mlx_posttrain.data.batches import Batch

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

#: Names in ``Batch.extra``: [N] each token's share of the step's tokens, to average metrics by; [B] each
#: row's number of tokens.
SHARE, LENGTHS = "token_share", "lengths"


def aggregate(batches: Sequence[Batch], how: Aggregation, max_tokens: int) -> list[Batch]:
    """The micro-batches of one optimizer step, weighted so that :func:`~losses.sft.token_mean` aggregates.

    max_tokens: the longest completion allowed, in tokens. ``extra`` gains SHARE and LENGTHS. Raises
    ValueError for another aggregation.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {how!r}")
    tokens = sum(b.trained_tokens for b in batches)
    found = []
    for batch in batches:
        lengths = np.bincount(batch.row, batch.mask, len(batch.tokens)).astype(np.float32)
        weight, units = batch.weight, None if how == "token-mean" else float(len(batch.tokens))
        if how == "seq-mean-token-mean":
            weight = 1.0 / np.maximum(lengths, 1.0)[batch.row]
        elif how == "seq-mean-token-sum-norm":
            weight = np.full_like(weight, 1.0 / max_tokens)
        extra = {**batch.extra, SHARE: batch.mask / np.float32(tokens), LENGTHS: np.maximum(lengths, 1.0)}
        found.append(replace(batch, weight=weight, units=units, extra=extra))
    return found
