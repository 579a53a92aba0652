"""Losses of proximal policy optimisation, per token (Schulman et al. 2017).

    ratio = exp(log pi(token) - log pi_old(token))
    policy loss = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    value loss  = 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)

All functions are elementwise over completion tokens; :func:`mlx_posttrain.losses.sft.token_mean` averages
them. All arrays have the same shape [...]; ``mask`` is above 0 at real tokens. It is applied inside the
exponential, so that no number at a padded position, not even nan, reaches a value or a gradient. Gradients
flow into the first argument only if the caller's other arrays are data, as they are here.
"""

from __future__ import annotations

from typing import Any

from mlx_posttrain.ops import ops

Array = Any


def _masked(x: Array, mask: Array) -> Array:
    xp = ops(x)
    return xp.where(mask > 0, x, xp.zeros_like(x))


def log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    """log pi - log pi_old at real tokens, 0 elsewhere: [...] nats."""
    return _masked(logprobs, mask) - _masked(old_logprobs, mask)


def clipped_policy(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float = 0.2
) -> Array:
    """The clipped surrogate, negated: max(-A r, -A clip(r, 1 - c, 1 + c)), 0 at padding.

    logprobs: [...] log-probabilities of the completion's tokens under the policy being trained; old_logprobs:
    under the policy that sampled them; advantages: of the tokens. Returns [...]. Schulman et al. 2017, eq. 7.
    """
    xp = ops(logprobs)
    ratio = xp.exp(log_ratio(logprobs, old_logprobs, mask))
    gain = _masked(advantages, mask)
    return xp.maximum(-gain * ratio, -gain * xp.clip(ratio, 1.0 - clip, 1.0 + clip))


def clipped_value(
    values: Array, old_values: Array, returns: Array, mask: Array, clip: float | None = 0.2
) -> Array:
    """Half the squared error of the value, clipped pessimistically; 0 at padding.

    The error is the larger of the value's own and that of the value held within ``clip`` of the old one, as
    in Schulman's code (openai/baselines), kept by Ziegler et al. 2019 and TRL. values, old_values, returns:
    [...] in units of the reward; clip None: plain half squared error. Returns [...].
    """
    xp = ops(values)
    values, old_values, returns = (_masked(x, mask) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if clip is not None:
        held = old_values + xp.clip(values - old_values, -clip, clip)
        error = xp.maximum(error, (held - returns) ** 2)
    return 0.5 * error


def entropy(logits: Array) -> Array:
    """Entropy of the next-token distribution in nats: [..., V] -> [...]."""
    xp = ops(logits)
    log_p = xp.log_softmax(logits, axis=-1)
    return -xp.sum(xp.exp(log_p) * log_p, axis=-1)


def update_statistics(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float = 0.2
) -> dict[str, Array]:
    """Statistics of an update, elementwise and without gradient: ``ratio``, ``approx_kl``, ``clip_fraction``.

    approx_kl: (log ratio)^2 / 2, which is KL(old || new) to second order (Schulman 2020, "Approximating KL
    divergence", k2). clip_fraction: 1 where the clipped branch is the larger one and the token's gradient is
    therefore 0. At padding the ratio is 1 and the others are 0.
    """
    xp = ops(logprobs)
    delta = xp.stop_gradient(log_ratio(logprobs, old_logprobs, mask))
    ratio, gain = xp.exp(delta), xp.stop_gradient(_masked(advantages, mask))
    active = -gain * xp.clip(ratio, 1.0 - clip, 1.0 + clip) > -gain * ratio
    return {"ratio": ratio, "approx_kl": 0.5 * delta**2, "clip_fraction": xp.astype(active, ratio)}


def value_clip_fraction(
    values: Array, old_values: Array, returns: Array, mask: Array, clip: float | None = 0.2
) -> Array:
    """1 where the clipped error is the larger one and the value's gradient is therefore 0.

    0 elsewhere, at padding and without clipping. Arguments as in :func:`clipped_value`.
    """
    xp = ops(values)
    values, old_values, returns = (xp.stop_gradient(_masked(x, mask)) for x in (values, old_values, returns))
    if clip is None:
        return xp.zeros_like(values)
    held = old_values + xp.clip(values - old_values, -clip, clip)
    return xp.astype((held - returns) ** 2 > (values - returns) ** 2, values)
