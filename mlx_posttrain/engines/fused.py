"""What the fused heads of both engines share: how logits are cut into chunks, and the derivatives of what is
read off a chunk.

A language model's last layer makes V logits of d numbers, and a loss keeps of them one or two numbers per
position. The engines therefore form logits for a chunk of positions at a time and let them go: after Wijmans
et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", and Hsu et al. 2024, "Liger Kernel", with
matrix products of the array library in place of kernels. Two ways to a gradient:

- *steered*, for a frozen head in training. d(value) / d(hidden) = (d value / d logits) @ W is [N, d] and can
  be formed while the logits
  are there: nothing is computed twice. It holds for any cotangent, since a position's value depends on its
  own hidden state only. Where two values are known to enter a loss as one sum, the sum's slope is formed,
  with one product.
- *kept and recomputed*, otherwise: W's gradient is a sum over positions weighted by their cotangents, which
  the forward pass does not know. Of
  the first positions, KEPT_BYTES worth, the slopes are kept until the backward pass, which follows at once;
  of the others it forms logits again, a part of the vocabulary at a time, since the log-sum-exp is known by
  then. A value without a gradient costs nothing more.

The truth that both are tested against is losses/sft.py and losses/ppo.py over all logits at once. Shapes: n
positions, V vocabulary entries, either of them perhaps a part; z: logits [n, V]; p: their softmax; lse: the
log-sum-exp over the whole vocabulary, [n, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_posttrain.ops import ops

Array = Any

#: Bytes of one float32 array of logits, of which a handful are alive at once: 128 positions of GPT-2's
#: vocabulary. Up to twice that to fill a panel.
CHUNK_BYTES = 26 * 2**20

#: Bytes of slopes that are kept for the backward pass: 640 positions of GPT-2's vocabulary.
KEPT_BYTES = 128 * 2**20

#: Chunks are multiples of so many positions, or entries of the vocabulary. BLAS libraries multiply by panels:
#: with GPT-2's head 83 positions at once go at half the rate of 64 or 128.
PANEL = 64


def chunks(length: int, other: int) -> list[slice]:
    """One side of [positions, vocabulary] in parts of whole panels, but for the last, whose logits fit
    CHUNK_BYTES; ``other``: length of the side left whole.

    Where a panel would take more than twice that it is halved until it fits, to one position at least.
    Depends on shapes only, so a compiled step stays compiled.
    """
    panel = PANEL
    while panel > 1 and 4 * other * panel > 2 * CHUNK_BYTES:
        panel //= 2
    most = max(panel, CHUNK_BYTES // (4 * other) // panel * panel)
    count = max(1, -(-length // most))
    size = max(1, -(-length // count // panel) * panel)
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def kept(length: int, vocabulary: int) -> int:
    """How many of ``length`` positions have their slopes kept: whole chunks, for as long as they fit
    KEPT_BYTES.
    """
    fit = KEPT_BYTES // (4 * vocabulary)
    return max((part.stop for part in chunks(length, vocabulary) if part.stop <= fit), default=0)


class Fall(NamedTuple):
    """How a value [N, 1] falls with its logits, - d value / d z, but for the 1 that a log-probability has at
    its target.

    at(z, rows, part): it, [n, v], at the logits z of ``rows`` and of ``part`` of the vocabulary. kept: it,
    [n, V] each, of the first chunks. target: [N] the targets, of a log-probability.
    """

    at: Callable[[Array, slice, slice], Array]
    kept: list[Array]
    target: Array | None = None


def softmax(z: Array) -> tuple[Array, Array]:
    """p and lse with one exponential per logit: the likeliest entry has p = exp(max z - lse), at least
    1/V.
    """
    xp = ops(z)
    p = xp.softmax(z, axis=-1)
    return p, xp.max(z, axis=-1, keepdims=True) - xp.log(xp.max(p, axis=-1, keepdims=True))


def kl(z: Array, p: Array, lse: Array, z_ref: Array, p_ref: Array, lse_ref: Array, direction: str) -> Array:
    """:func:`mlx_posttrain.losses.sft.full_kl` from softmaxes that are there already: [n, 1]."""
    xp = ops(z)
    if direction == "forward":
        return xp.sum(p_ref * (z_ref - z), axis=-1, keepdims=True) - lse_ref + lse
    if direction != "reverse":
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    return xp.sum(p * (z - z_ref), axis=-1, keepdims=True) - lse + lse_ref


def kl_slope(
    z: Array, p: Array, lse: Array, z_ref: Array, p_ref: Array, lse_ref: Array, value: Array, direction: str
) -> Array:
    """d kl / d z: p - p_ref, or p (log p - log p_ref - kl). [n, V]."""
    return p - p_ref if direction == "forward" else p * (z - z_ref - (lse - lse_ref + value))


def entropy(z: Array, p: Array, lse: Array) -> Array:
    """:func:`mlx_posttrain.losses.policy.entropy` from a softmax that is there already: [n, 1]."""
    return lse - ops(z).sum(p * z, axis=-1, keepdims=True)


def entropy_slope(z: Array, p: Array, lse: Array, value: Array) -> Array:
    """d entropy / d z = -p (log p + entropy). [n, V]."""
    return p * (lse - value - z)
