"""Losses of policy optimisation, per token: PPO (Schulman et al. 2017), GRPO and its family.

    ratio = exp(log pi(token) - log pi_old(token))
    policy loss = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    value loss  = 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)

Here is what is differentiated; rl/advantages.py makes A, and rl/aggregation.py says how tokens are averaged.

All functions but :func:`sequence_log_ratio` are elementwise over completion tokens;
:func:`mlx_posttrain.losses.sft.token_mean` averages them. All arrays have the same shape [...]; ``mask`` is
above 0 at real tokens. It is applied inside the exponential, so that no number at a padded position, not even
nan, reaches a value or a gradient. Gradients flow into the first argument only if the caller's other arrays
are data, as they are here.
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


def _ratio(log_ratios: Array, mask: Array) -> Array:
    """exp of log-ratios within +-60, 1 at padding: beyond, float32 overflows, and 0 * inf would be nan."""
    xp = ops(log_ratios)
    return xp.exp(xp.clip(_masked(log_ratios, mask), -60.0, 60.0))


def sequence_log_ratio(log_ratios: Array, row: Array, rows: int, lengths: Array | None = None) -> Array:
    """A whole completion's log-ratio at each of its tokens: the sum of its tokens', or their mean.

    log_ratios: [N], 0 at padding; row: [N] the row of each position; lengths: [rows] tokens of each row, for
    the mean, which is the log of GSPO's ratio (Zheng et al. 2025, eq. 7); None: the sum, the log-ratio of the
    completion's probabilities. Returns [N].
    """
    total = ops(log_ratios).segment_sum(log_ratios, row, rows)
    return (total if lengths is None else total / lengths)[row]


def clipped_surrogate(
    log_ratios: Array,
    advantages: Array,
    mask: Array,
    low: float = 0.2,
    high: float | None = None,
    delta: float | None = None,
) -> Array:
    """The clipped surrogate, negated: max(-A r, -A clip(r, 1 - low, 1 + high)), 0 at padding.

    log_ratios: [...] from :func:`log_ratio`; advantages: of the tokens. high: the upper bound where it is not
    ``low`` too (DAPO's clip-higher: Yu et al. 2025, eq. 8). delta: an upper bound of r in the first term,
    which without it has none where A is negative (two-sided clipping: INTELLECT-2, Prime Intellect 2025, eq.
    2); it must lie above 1 + high to bind there alone. Returns [...]. Schulman et al. 2017, eq. 7.
    """
    xp = ops(log_ratios)
    ratio, gain = _ratio(log_ratios, mask), _masked(advantages, mask)
    free = ratio if delta is None else xp.minimum(ratio, delta)
    held = xp.clip(ratio, 1.0 - low, 1.0 + (low if high is None else high))
    return xp.maximum(-gain * free, -gain * held)


def clipped_policy(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: float = 0.2
) -> Array:
    """PPO's policy loss: :func:`clipped_surrogate` of each token's own ratio, within 1 - clip and 1 + clip.

    logprobs: [...] log-probabilities of the completion's tokens under the policy being trained; old_logprobs:
    under the policy that sampled them; advantages: of the tokens. Returns [...].
    """
    return clipped_surrogate(log_ratio(logprobs, old_logprobs, mask), advantages, mask, clip)


def kl_estimate(
    logprobs: Array, ref_logprobs: Array, mask: Array, kind: str, old_logprobs: Array | None = None
) -> Array:
    """A sampled token's estimate of KL(policy || reference) in nats, 0 at padding: [...].

    With d = log pi - log ref at the token that the policy sampled (Schulman 2020, "Approximating KL
    divergence"):

        k1  d                       unbiased, may be negative; as a loss its gradient has mean 0
        k2  d^2 / 2                 biased, small variance; its gradient is that of KL itself
        k3  exp(-d) - 1 + d         unbiased and positive; GRPO's (Shao et al. 2024, eq. 4)
        unbiased  (pi / pi_old) k3  k3 reweighted to the policy being trained, so that its gradient is
                                    unbiased too (DeepSeek-V3.2, 2025, eq. 7); needs ``old_logprobs``

    Raises ValueError for another kind.
    """
    xp = ops(logprobs)
    d = log_ratio(logprobs, ref_logprobs, mask)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind not in ("k3", "unbiased"):
        raise ValueError(f"kind must be k1, k2, k3 or unbiased, got {kind!r}")
    k3 = xp.expm1(-d) + d
    if kind == "k3":
        return k3
    return xp.exp(log_ratio(logprobs, old_logprobs, mask)) * k3


def cispo(log_ratios: Array, logprobs: Array, advantages: Array, mask: Array, high: float = 5.0) -> Array:
    """CISPO: REINFORCE weighted by the ratio, which is bounded and not differentiated; [...].

    -stop_gradient(min(r, high)) A log pi: every token keeps a gradient. MiniMax-M1 2025, eq. 4.
    """
    xp = ops(log_ratios)
    ratio = _ratio(log_ratios, mask)
    weight = xp.stop_gradient(xp.minimum(ratio, high))
    return -weight * _masked(advantages, mask) * _masked(logprobs, mask)


def sapo(
    log_ratios: Array, advantages: Array, mask: Array, positive: float = 1.0, negative: float = 1.05
) -> Array:
    """SAPO: a sigmoid gate of the ratio in place of a clip; [...].

    -A 4 sigma(t (r - 1)) / t, with the temperature t ``positive`` where A > 0 and ``negative`` elsewhere. Gao
    et al. 2025, "Soft Adaptive Policy Optimization", eq. 5.
    """
    xp = ops(log_ratios)
    ratio, gain = _ratio(log_ratios, mask), _masked(advantages, mask)
    ones = xp.ones_like(ratio)
    sharpness = xp.where(gain > 0, positive * ones, negative * ones)
    return -gain * 4.0 * xp.sigmoid(sharpness * (ratio - 1.0)) / sharpness


def vespo(
    log_ratios: Array,
    logprobs: Array,
    advantages: Array,
    mask: Array,
    row: Array,
    rows: int,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Array:
    """VESPO: REINFORCE weighted by a bump around a whole completion's ratio w; [N].

    -stop_gradient(w^k e^(t (1 - w))) A log pi, with (k, t) ``positive`` where A > 0 and ``negative``
    elsewhere. row: [N] the row of each position. As in TRL, after "Variational sequence-level soft policy
    optimization" (2026).
    """
    xp = ops(log_ratios)
    gain = _masked(advantages, mask)
    whole = sequence_log_ratio(_masked(log_ratios, mask), row, rows)

    def bump(power: float, rate: float) -> Array:
        return xp.exp(power * whole + rate * (1.0 - xp.exp(whole)))

    weight = xp.stop_gradient(xp.where(gain > 0, bump(*positive), bump(*negative)))
    return -weight * gain * _masked(logprobs, mask)


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
    low, high = clipped(delta, advantages, mask, clip)
    return {"ratio": xp.exp(delta), "approx_kl": 0.5 * delta**2, "clip_fraction": low + high}


def clipped(
    log_ratios: Array,
    advantages: Array,
    mask: Array,
    low: float = 0.2,
    high: float | None = None,
    delta: float | None = None,
) -> tuple[Array, Array]:
    """1 where :func:`clipped_surrogate` holds a token's gradient at 0: at its lower, and at an upper bound.

    Arguments as there. Returns two [...], without gradient.
    """
    xp = ops(log_ratios)
    ratio = _ratio(xp.stop_gradient(log_ratios), mask)
    gain = xp.stop_gradient(_masked(advantages, mask))
    upper = (ratio > 1.0 + (low if high is None else high)) & (gain > 0)
    if delta is not None:
        upper = upper | ((ratio > delta) & (gain < 0))
    return xp.astype((ratio < 1.0 - low) & (gain < 0), ratio), xp.astype(upper, ratio)


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
