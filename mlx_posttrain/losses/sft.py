"""Supervised losses: log-probabilities of target tokens, divergence from a reference, and their mean.

All functions but :func:`token_mean`, which averages, are elementwise over positions. Shapes: [...] positions
in any layout, flat or a grid; V vocabulary entries.
"""

from __future__ import annotations

from typing import Any

from mlx_posttrain.ops import ops

Array = Any


def token_logprobs(logits: Array, targets: Array) -> Array:
    """Log-probability of each target token.

    logits: [..., V] unnormalised, in nats; targets: [...] integer ids. Returns [...]. Written as gather minus
    log-sum-exp, so that no [..., V] array of log-probabilities is formed.
    """
    xp = ops(logits)
    chosen = xp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - xp.logsumexp(logits, axis=-1)


def full_kl(logits: Array, reference_logits: Array, direction: str = "forward") -> Array:
    """KL divergence between two next-token distributions over the whole vocabulary, in nats per position.

    logits, reference_logits: [..., V]. Returns [...], zero or positive. ``forward`` is KL(reference ||
    policy) = sum_v p_ref (log p_ref - log p): it punishes losing what the reference could say. ``reverse`` is
    KL(policy || reference): it punishes saying what the reference would not; this is RLHF's direction
    (Ziegler et al. 2019, eq. 2). The gradient does not flow into ``reference_logits``. Raises ValueError for
    another direction.
    """
    xp = ops(logits)
    log_p = xp.log_softmax(logits, axis=-1)
    log_ref = xp.stop_gradient(xp.log_softmax(reference_logits, axis=-1))
    if direction == "forward":
        return xp.sum(xp.exp(log_ref) * (log_ref - log_p), axis=-1)
    if direction == "reverse":
        return xp.sum(xp.exp(log_p) * (log_p - log_ref), axis=-1)
    raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")


def sequence_logprobs(
    logprobs: Array, mask: Array, row: Array, rows: int, weight: Array | None = None
) -> Array:
    """Sum of each row's token log-probabilities, in nats.

    logprobs, mask: [N], the mask 0 at padding; row: [N] the row of each position; rows: how many there are;
    weight: [N] how much a token counts, 1 without one. Returns [rows].
    """
    xp = ops(logprobs)
    counted = logprobs if weight is None else weight * logprobs
    return xp.segment_sum(xp.where(mask > 0, counted, xp.zeros_like(logprobs)), row, rows)


def token_mean(values: Array, mask: Array, total: Array | float, weight: Array | None = None) -> Array:
    """Weighted sum over positions divided by ``total``, a scalar.

    values, mask, weight: same shape; the mask is 0 at padding, where any number may stand, and the weight, 1
    without one, says how much a position counts. ``total`` is the sum of weights over the *whole* accumulated
    batch, not over these positions: the parts of an accumulated step then add up to the mean over all its
    trained tokens, and 8 micro-batches of 1 row give the gradient of one batch of 8.
    """
    xp = ops(values)
    # where() first, since 0 * inf would be NaN, in the value and in the gradient.
    real = xp.where(mask > 0, values, xp.zeros_like(values))
    return xp.sum(real * (mask if weight is None else mask * weight)) / total
