"""Losses read off logits a chunk of positions at a time: what both engines share.

A language model's last layer makes V logits of d numbers, and a loss keeps one or two numbers per position of
them. The engines therefore form the logits of a chunk of positions at a time and discard them: after Wijmans
et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", and Hsu et al. 2024, "Liger Kernel", with
matrix products of the array library in place of kernels. A gradient is made in one of two ways:

- *streamed*, for a frozen head in training. d(value) / d(hidden) = (d value / d logits) @ W is [N, d] and is
  formed while the logits are there: nothing is computed twice. It holds for any cotangent, since a position's
  value depends on its own hidden state only. Where two values are known to enter a loss as one sum, the sum's
  gradient is formed, with one product.
  A few rows of W that are trained all the same, those of new tokens, have their gradient from their own few
  logits, as below.
- *cached and recomputed*, otherwise: W's gradient is a sum over positions weighted by their cotangents, which
  the forward pass does not know. It caches the gradients with respect to the logits of the first positions,
  up to CACHED_BYTES, for the backward pass, which follows at once. The backward pass forms the logits of the
  other positions again, a part of the vocabulary at a time, since the log-sum-exp is known by then. A value
  that needs no gradient costs nothing more.

A head in half precision is multiplied in float32, a part of its rows at a time, and hidden states come as
float32. A product in half precision is rounded to it: GPT-2's logits, near -100, by up to 1/4 in bfloat16 and
1/32 in float16.

Both ways are tested against losses/sft.py and losses/policy.py over all logits at once.

Shapes: n positions, V vocabulary entries, either of them perhaps a part; z: logits [n, V]; p: their softmax;
lse: the log-sum-exp over the whole vocabulary, [n, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_posttrain.engines import sizes
from mlx_posttrain.ops import ops

Array = Any

#: Bytes of one float32 array of logits, of which a handful are alive at once: 128 positions of GPT-2's
#: vocabulary. A chunk may take up to twice as much to fill a panel. All sizes grow with :mod:`engines.sizes`.
CHUNK_BYTES = 26 * 2**20

#: Bytes of gradients that are cached for the backward pass: 640 positions of GPT-2's vocabulary.
CACHED_BYTES = 128 * 2**20

#: Chunks are multiples of this many positions, or vocabulary entries, because BLAS libraries multiply by
#: panels: with GPT-2's head 83 positions at once run at three quarters of the rate of 128.
PANEL = 64


def chunks(length: int, other: int) -> list[slice]:
    """Cut one side of [positions, vocabulary] into parts whose logits fit CHUNK_BYTES.

    length: of the side that is cut; other: of the side left whole. All parts but the last are whole panels.
    Where a panel would take more than twice CHUNK_BYTES it is halved until it fits, down to one position.
    Depends on shapes only, so a compiled step stays compiled.
    """
    panel, chunk = PANEL, sizes.scale() * CHUNK_BYTES
    while panel > 1 and 4 * other * panel > 2 * chunk:
        panel //= 2
    most = max(panel, chunk // (4 * other) // panel * panel)
    count = max(1, -(-length // most))
    size = max(1, -(-length // count // panel) * panel)
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def cached_positions(length: int, vocabulary: int) -> int:
    """How many of ``length`` positions have their gradients cached: whole chunks that fit CACHED_BYTES."""
    fit = sizes.scale() * CACHED_BYTES // (4 * vocabulary)
    return max((part.stop for part in chunks(length, vocabulary) if part.stop <= fit), default=0)


class NegGrad(NamedTuple):
    """Minus the gradient of a per-position value [N, 1] with respect to its logits, - d value / d z.

    The 1 that a log-probability's gradient has at its target is left out; it is added where ``target`` is
    set.

    at(z, rows, part): minus the gradient, [n, v], at the logits z of the positions ``rows`` and the
    vocabulary entries ``part``, a slice or ids [v]. cached: the same of the first chunks, [n, V] each.
    target: [N] ids, where the value is a log-probability.
    """

    at: Callable[[Array, slice, Any], Array]
    cached: list[Array]
    target: Array | None = None


def neg_grad_of(neg_grad: NegGrad, z: Array, ids: Array) -> Array:
    """Minus the gradient with respect to the logits z [N, v] of the entries ``ids`` [v], complete."""
    found = neg_grad.at(z, slice(None), ids)
    if neg_grad.target is None:
        return found
    return ops(z).where(neg_grad.target[:, None] == ids, found - 1.0, found)


def softmax(z: Array) -> tuple[Array, Array]:
    """Softmax p and log-sum-exp lse of logits z, with one exponential per logit.

    The likeliest entry has p = exp(max z - lse), which is at least 1/V, so its logarithm gives lse.
    """
    xp = ops(z)
    p = xp.softmax(z, axis=-1)
    return p, xp.max(z, axis=-1, keepdims=True) - xp.log(xp.max(p, axis=-1, keepdims=True))


def kl(z: Array, p: Array, lse: Array, z_ref: Array, p_ref: Array, lse_ref: Array, direction: str) -> Array:
    """:func:`mlx_posttrain.losses.sft.full_kl` from softmaxes already computed, [n, 1].

    Raises ValueError for a direction other than ``forward`` and ``reverse``.
    """
    xp = ops(z)
    if direction == "forward":
        return xp.sum(p_ref * (z_ref - z), axis=-1, keepdims=True) - lse_ref + lse
    if direction != "reverse":
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    return xp.sum(p * (z - z_ref), axis=-1, keepdims=True) - lse + lse_ref


def kl_grad(
    z: Array, p: Array, lse: Array, z_ref: Array, p_ref: Array, lse_ref: Array, value: Array, direction: str
) -> Array:
    """d kl / d z, [n, V]: p - p_ref (forward), or p (log p - log p_ref - kl) (reverse).

    value: the divergence itself, [n, 1].
    """
    return p - p_ref if direction == "forward" else p * (z - z_ref - (lse - lse_ref + value))


def entropy(z: Array, p: Array, lse: Array) -> Array:
    """:func:`mlx_posttrain.losses.policy.entropy` from a softmax already computed, [n, 1]."""
    return lse - ops(z).sum(p * z, axis=-1, keepdims=True)


def entropy_grad(z: Array, p: Array, lse: Array, value: Array) -> Array:
    """d entropy / d z = -p (log p + entropy), [n, V]; value: the entropy itself, [n, 1]."""
    return p * (lse - value - z)
