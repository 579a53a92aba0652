"""Log-probabilities, entropies and divergences from hidden states, on MLX, a chunk of positions at a time.
See fused.py.

Shapes: N positions, d width, V vocabulary entries; h: [N, d] hidden states; w: [V, d] the head's weight;
target: [N] token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_posttrain.engines import fused
from mlx_posttrain.engines.mlx.cpu.exp import exp_below, softmax_and_lse


def logprobs(h: mx.array, w: mx.array, target: mx.array, *, trained: bool, training: bool) -> mx.array:
    """[N] log-probabilities of the targets.

    trained: whether w has a gradient; training: whether one is about to be asked for, so that it is steered,
    or slopes are kept for it: fused.py.
    """

    def values(h: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z = _logits(h, w)
        p, lse = softmax_and_lse(z)
        return [
            _at(z, target) - lse,
            lse,
            *([w[target] - _times(p, w)] if training and not trained else []),
        ], p

    (value, lse, *slope), kept = _sweep(values, trained and training, w, h, target)
    return _with_gradient(value, h, w, slope, fused.Fall(_softmax_of(lse), kept, target), trained)[:, 0]


def logprobs_and_entropy(
    h: mx.array, w: mx.array, target: mx.array, *, trained: bool, training: bool
) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities of the targets and [N] entropies, whose gradient is recomputed: PPO only reports
    them.
    """

    def values(h: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z = _logits(h, w)
        p, lse = softmax_and_lse(z)
        found = [_at(z, target) - lse, fused.entropy(z, p, lse), lse]
        return [*found, *([w[target] - _times(p, w)] if training and not trained else [])], p

    (value, entropy, lse, *slope), kept = _sweep(values, trained and training, w, h, target)
    softmax = _softmax_of(lse)

    def fall_of_entropy(z: mx.array, rows: slice, part: slice) -> mx.array:
        return -fused.entropy_slope(z, softmax(z, rows, part), lse[rows], entropy[rows])

    value = _with_gradient(value, h, w, slope, fused.Fall(softmax, kept, target), trained)
    return value[:, 0], _with_gradient(entropy, h, w, [], fused.Fall(fall_of_entropy, []), trained)[:, 0]


def logprobs_and_kl(
    h: mx.array,
    w: mx.array,
    h_ref: mx.array,
    w_ref: mx.array,
    target: mx.array,
    direction: str,
    beta: float | None = None,
    *,
    trained: bool,
    training: bool,
) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities of the targets and [N] divergences from the reference, into which no gradient
    flows.

    beta: what :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl` says; the gradient then hangs on the
    log-probabilities alone.
    """

    def values(h: mx.array, h_ref: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z, z_ref = _logits(h, w), _logits(h_ref, w_ref)
        (p, lse), (p_ref, lse_ref) = softmax_and_lse(z), softmax_and_lse(z_ref)
        kl = fused.kl(z, p, lse, z_ref, p_ref, lse_ref, direction)
        found = [_at(z, target) - lse, kl, lse, lse_ref]
        slope = fused.kl_slope(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
        fall = p if beta is None else p + beta * slope
        if training and not trained:
            found += [w[target] - _times(fall, w), *([_times(slope, w)] if beta is None else [])]
        return found, fall

    (value, kl, lse, lse_ref, *slopes), kept = _sweep(values, trained and training, w, h, h_ref, target)
    softmax = _softmax_of(lse)

    def fall_of_kl(z: mx.array, rows: slice, part: slice) -> mx.array:
        z_ref = _logits(h_ref[rows], w_ref[part])
        p, p_ref = softmax(z, rows, part), _softmax_of(lse_ref)(z_ref, rows, part)
        return -fused.kl_slope(z, p, lse[rows], z_ref, p_ref, lse_ref[rows], kl[rows], direction)

    def fall_of_both(z: mx.array, rows: slice, part: slice) -> mx.array:
        return softmax(z, rows, part) - (beta or 0.0) * fall_of_kl(z, rows, part)

    value = _with_gradient(
        value, h, w, slopes[:1], fused.Fall(softmax if beta is None else fall_of_both, kept, target), trained
    )
    divergence = (
        _with_gradient(kl, h, w, slopes[1:], fused.Fall(fall_of_kl, []), trained) if beta is None else kl
    )
    return value[:, 0], divergence[:, 0]


def _logits(h: mx.array, w: mx.array) -> mx.array:
    return (h @ w.T).astype(mx.float32)


def _times(slope: mx.array, w: mx.array) -> mx.array:
    return slope.astype(w.dtype) @ w


def _at(z: mx.array, target: mx.array) -> mx.array:
    return mx.take_along_axis(z, target[:, None], axis=-1)


def _softmax_of(lse: mx.array) -> Callable[[mx.array, slice, slice], mx.array]:
    return lambda z, rows, _: exp_below(z, lse[rows])


def _sweep(
    function: Callable[..., tuple[list[mx.array], mx.array]], keep: bool, w: mx.array, *rows: mx.array
) -> tuple[list[mx.array], list[mx.array]]:
    """``function`` over chunks of ``rows``, without gradient; its arrays, joined along the positions, and
    what is kept of it.
    """
    count = rows[0].shape[0]
    most = fused.kept(count, w.shape[0]) if keep else 0
    parts: list[list[mx.array]] = []
    kept: list[mx.array] = []
    for part in fused.chunks(count, w.shape[0]):
        chunk = [mx.stop_gradient(a[part]) for a in rows]
        # MLX chooses its own order of work: without the dependency the logits of all chunks may be there at
        # once.
        found, fall = function(*(mx.depends(chunk, parts[-1]) if parts else chunk))
        parts.append(found)
        if part.stop <= most:
            kept.append(mx.stop_gradient(fall.astype(w.dtype)))
    return [mx.stop_gradient(mx.concatenate(list(arrays))) for arrays in zip(*parts, strict=True)], kept


def _with_gradient(
    value: mx.array, h: mx.array, w: mx.array, slope: list[mx.array], fall: fused.Fall, trained: bool
) -> mx.array:
    """``value`` [N, 1] steered by its slope [N, d] where there is one, else with the gradient that ``fall``
    says.
    """
    if slope:
        # what is added is zero
        return value + mx.sum((h - mx.stop_gradient(h)) * slope[0], axis=-1, keepdims=True)
    return _attached(value, h, w, fall, trained)


def _attached(value: mx.array, h: mx.array, w: mx.array, fall: fused.Fall, trained: bool) -> mx.array:
    """``value`` with its gradients with respect to h and, when ``trained``, w: from what was kept, and from
    forming other logits again.

    A part of the vocabulary at a time: each part of w's gradient is complete when it is made.
    """

    @mx.custom_function
    def attach(h: mx.array, w: mx.array, value: mx.array) -> mx.array:
        return value

    @attach.vjp
    def attach_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: Any) -> list[mx.array]:
        h, w, value = primals
        g = cotangent.astype(h.dtype)
        weighted, d_h = -g * h, mx.zeros(h.shape, h.dtype)
        rest = slice(sum(some.shape[0] for some in fall.kept), h.shape[0])
        d_w: list[mx.array] = []
        for part in fused.chunks(w.shape[0], h.shape[0]):
            hidden = mx.depends([h], [d_h, *d_w[-1:]])[0]
            some = [kept[:, part] for kept in fall.kept]
            if rest.start < rest.stop:
                some.append(fall.at(_logits(hidden[rest], w[part]), rest, part).astype(w.dtype))
            falls = mx.concatenate(some)
            d_h = mx.addmm(d_h, falls, w[part])
            if trained:
                d_w.append(_head_gradient(falls, weighted))
        d_head = mx.concatenate(d_w) if trained else mx.zeros_like(w)
        d_h = -g * d_h
        if fall.target is not None:
            d_h = d_h + g * w[fall.target]
            d_head = d_head.at[fall.target].add(g * h) if trained else d_head
        return [d_h, d_head, mx.zeros_like(value)]

    attached: Any = attach(h, w, value)
    return attached


def _head_gradient(fall: mx.array, weighted: mx.array) -> mx.array:
    return fall.T @ weighted
