"""Log-probabilities, entropies and divergences from hidden states, on MLX, a chunk of positions at a time. See fused.py.

Shapes: N positions, d width, V vocabulary entries; h: [N, d] hidden states; w: [V, d] the head's weight; target: [N] token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_posttrain.engines import fused
from mlx_posttrain.engines.mlx_exp import exp_below, logsumexp

#: slope_at(z, cotangents, part): d loss / d z, [N, v], at the logits z of ``part`` of the vocabulary; see ``_recompute``.
Slope = Callable[[mx.array, Sequence[mx.array], slice], mx.array]


def logprobs(h: mx.array, w: mx.array, target: mx.array, *, steered: bool, trained: bool) -> mx.array:
    """[N] log-probabilities of the targets. steered: as in fused.py; trained: whether w has a gradient."""
    if steered:

        def values(h: mx.array, target: mx.array) -> list[mx.array]:
            z = _logits(h, w)
            p, lse = fused.softmax(z)
            return [_at(z, target) - lse, w[target] - _times(p, w)]

        value, slope = _sweep(values, w, h, target)
        return _steer(value, h, slope)[:, 0]

    def normalised(h: mx.array, target: mx.array) -> list[mx.array]:
        z = _logits(h, w)
        lse = logsumexp(z, keepdims=True)
        return [_at(z, target) - lse, lse]

    value, lse = _sweep(normalised, w, h, target)
    return _recompute([value], h, w, _logprob_slope(lse), target, trained)[0][:, 0]


def logprobs_and_entropy(h: mx.array, w: mx.array, target: mx.array, *, steered: bool, trained: bool) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities of the targets and [N] entropies, whose gradient is recomputed: PPO only reports them."""

    def values(h: mx.array, target: mx.array) -> list[mx.array]:
        z = _logits(h, w)
        p, lse = fused.softmax(z)
        return [_at(z, target) - lse, fused.entropy(z, p, lse), lse] + ([w[target] - _times(p, w)] if steered else [])

    value, entropy, lse, *slope = _sweep(values, w, h, target)

    def slope_at(z: mx.array, cotangents: Sequence[mx.array], _: slice) -> mx.array:
        return cotangents[0] * fused.entropy_slope(z, exp_below(z, lse), lse, entropy)

    (with_gradient,) = _recompute([entropy], h, w, slope_at, None, trained)
    value = _steer(value, h, slope[0]) if steered else _recompute([value], h, w, _logprob_slope(lse), target, trained)[0]
    return value[:, 0], with_gradient[:, 0]


def logprobs_and_kl(
    h: mx.array, w: mx.array, h_ref: mx.array, w_ref: mx.array, target: mx.array, direction: str, beta: float | None = None, *,
    steered: bool, trained: bool,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """[N] log-probabilities of the targets and [N] divergences from the reference, into which no gradient flows.

    beta: what :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl` says; a steered gradient then hangs on the log-probabilities alone.
    """

    def values(h: mx.array, h_ref: mx.array, target: mx.array) -> list[mx.array]:
        z, z_ref = _logits(h, w), _logits(h_ref, w_ref)
        (p, lse), (p_ref, lse_ref) = fused.softmax(z), fused.softmax(z_ref)
        kl = fused.kl(z, p, lse, z_ref, p_ref, lse_ref, direction)
        found = [_at(z, target) - lse, kl, lse, lse_ref]
        if steered:
            slope = fused.kl_slope(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
            found += [w[target] - _times(p, w), _times(slope, w)] if beta is None else [w[target] - _times(p + beta * slope, w)]
        return found

    value, kl, lse, lse_ref, *slopes = _sweep(values, w, h, h_ref, target)
    if steered:
        return _steer(value, h, slopes[0])[:, 0], (_steer(kl, h, slopes[1]) if beta is None else kl)[:, 0]

    def slope_at(z: mx.array, cotangents: Sequence[mx.array], part: slice) -> mx.array:
        z_ref = _logits(h_ref, w_ref[part])
        p, p_ref = exp_below(z, lse), exp_below(z_ref, lse_ref)
        return cotangents[1] * fused.kl_slope(z, p, lse, z_ref, p_ref, lse_ref, kl, direction) - cotangents[0] * p

    with_gradient = _recompute([value, kl], h, w, slope_at, target, trained)
    return with_gradient[0][:, 0], with_gradient[1][:, 0]


def _logits(h: mx.array, w: mx.array) -> mx.array:
    return (h @ w.T).astype(mx.float32)


def _times(slope: mx.array, w: mx.array) -> mx.array:
    return slope.astype(w.dtype) @ w


def _at(z: mx.array, target: mx.array) -> mx.array:
    return mx.take_along_axis(z, target[:, None], axis=-1)


def _logprob_slope(lse: mx.array) -> Slope:
    return lambda z, cotangents, _: -cotangents[0] * exp_below(z, lse)


def _sweep(function: Callable[..., list[mx.array]], w: mx.array, *rows: mx.array) -> list[mx.array]:
    """``function`` over chunks of ``rows``, without gradient; its arrays, joined along the positions."""
    parts: list[list[mx.array]] = []
    for part in fused.chunks(rows[0].shape[0], w.shape[0]):
        chunk = [mx.stop_gradient(a[part]) for a in rows]
        # MLX chooses its own order of work: without the dependency the logits of all chunks may be there at once.
        parts.append(function(*(mx.depends(chunk, parts[-1]) if parts else chunk)))
    return [mx.stop_gradient(mx.concatenate(list(arrays))) for arrays in zip(*parts, strict=True)]


def _steer(value: mx.array, h: mx.array, slope: mx.array) -> mx.array:
    """``value`` [N, 1] whose gradient with respect to ``h`` is ``slope`` [N, d]: what is added is zero."""
    return value + mx.sum((h - mx.stop_gradient(h)) * slope, axis=-1, keepdims=True)


def _recompute(values: list[mx.array], h: mx.array, w: mx.array, slope_at: Slope, target: mx.array | None, trained: bool) -> list[mx.array]:
    """``values`` [N, 1], whose gradients with respect to h, and w when ``trained``, come from forming the logits again.

    Now that the log-sum-exp is known, a part of the vocabulary at a time: each part of w's gradient is complete when it is made. The 1 that
    a log-probability's slope has at its target is left out of ``slope_at``, and added where ``target`` is given, for the first value.
    """

    @mx.custom_function
    def attach(h: mx.array, w: mx.array, *values: mx.array) -> list[mx.array]:
        return list(values)

    @attach.vjp
    def attach_vjp(primals: Sequence[mx.array], cotangents: Any, _: Any) -> list[mx.array]:
        h, w, *values = primals
        gs = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
        d_h = mx.zeros(h.shape, h.dtype)
        d_w: list[mx.array] = []
        for part in fused.chunks(w.shape[0], h.shape[0]):
            hidden = mx.depends([h], [d_h, *d_w[-1:]])[0]
            slope = slope_at(_logits(hidden, w[part]), gs, part).astype(w.dtype)
            d_h = mx.addmm(d_h, slope, w[part])
            if trained:
                d_w.append(_head_gradient(slope, h))
        d_head = mx.concatenate(d_w) if trained else mx.zeros_like(w)
        if target is not None:
            g = gs[0].astype(h.dtype)
            d_h = d_h + g * w[target]
            d_head = d_head.at[target].add(g * h) if trained else d_head
        return [d_h, d_head, *(mx.zeros_like(v) for v in values)]

    attached: Any = attach(h, w, *values)
    return list(attached)


def _head_gradient(slope: mx.array, h: mx.array) -> mx.array:
    return slope.T @ h
