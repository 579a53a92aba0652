"""Log-probabilities, entropies and divergences from hidden states, a chunk of positions at a time, on MLX.

engines/fused.py says how, and what *streamed* and *cached* mean.

Shapes: N positions, d hidden size, V vocabulary entries; h: [N, d] float32 hidden states; w: [V, d] the
head's weight, perhaps packed; target: [N] token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_posttrain.engines import fused
from mlx_posttrain.engines.mlx.cpu.exp import exp_below, softmax_and_lse
from mlx_posttrain.engines.mlx.packed_head import PackedHead

Head = mx.array | PackedHead
Rows = tuple[mx.array, mx.array] | None


def logprobs(
    h: mx.array, w: Head, target: mx.array, *, trained: bool, training: bool, rows: Rows = None
) -> mx.array:
    """[N] log-probabilities of the targets.

    trained: whether w takes a gradient. training: whether a gradient is about to be asked for, so that it is
    streamed (a frozen w) or cached (a trained one). rows: ids [n] and rows [n, d] of a frozen w, in which
    they stand, that are trained.
    """

    def values(h: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z = _logits(h, w)
        p, lse = softmax_and_lse(z)
        return [
            _gather(z, target) - lse,
            lse,
            *([_dense(w, target) - _to_hidden(p, w)] if training and not trained else []),
        ], p

    (value, lse, *grad_h), cached = _map_chunks(values, trained and training, w, h, target)
    neg_grad = fused.NegGrad(_softmax_from(lse), cached, target)
    return _with_gradient(value, h, w, grad_h, neg_grad, trained, rows)[:, 0]


def logprobs_and_entropy(
    h: mx.array, w: Head, target: mx.array, *, trained: bool, training: bool, rows: Rows = None
) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities of the targets and [N] entropies.

    The gradient of the entropies is recomputed, since PPO only reports them. trained, training, rows: as in
    :func:`logprobs`.
    """

    def values(h: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z = _logits(h, w)
        p, lse = softmax_and_lse(z)
        outputs = [_gather(z, target) - lse, fused.entropy(z, p, lse), lse]
        return [*outputs, *([_dense(w, target) - _to_hidden(p, w)] if training and not trained else [])], p

    (value, entropy, lse, *grad_h), cached = _map_chunks(values, trained and training, w, h, target)
    softmax = _softmax_from(lse)

    def neg_grad_of_entropy(z: mx.array, rows: slice, part: slice) -> mx.array:
        return -fused.entropy_grad(z, softmax(z, rows, part), lse[rows], entropy[rows])

    value = _with_gradient(value, h, w, grad_h, fused.NegGrad(softmax, cached, target), trained, rows)
    entropy_neg_grad = fused.NegGrad(neg_grad_of_entropy, [])
    return value[:, 0], _with_gradient(entropy, h, w, [], entropy_neg_grad, trained, rows)[:, 0]


def logprobs_and_kl(
    h: mx.array,
    w: Head,
    h_ref: mx.array,
    w_ref: Head,
    target: mx.array,
    direction: str,
    beta: float | None = None,
    *,
    trained: bool,
    training: bool,
    rows: Rows = None,
) -> tuple[mx.array, mx.array]:
    """[N] log-probabilities of the targets and [N] divergences from the reference.

    No gradient flows into the reference. beta: as in
    :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl`; the log-probabilities alone then carry the
    gradient of both. trained, training, rows: as in :func:`logprobs`.
    """

    def values(h: mx.array, h_ref: mx.array, target: mx.array) -> tuple[list[mx.array], mx.array]:
        z, z_ref = _logits(h, w), _logits(h_ref, w_ref)
        (p, lse), (p_ref, lse_ref) = softmax_and_lse(z), softmax_and_lse(z_ref)
        kl = fused.kl(z, p, lse, z_ref, p_ref, lse_ref, direction)
        outputs = [_gather(z, target) - lse, kl, lse, lse_ref]
        kl_grad = fused.kl_grad(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
        neg_grad = p if beta is None else p + beta * kl_grad
        if training and not trained:
            outputs += [_dense(w, target) - _to_hidden(neg_grad, w)]
            outputs += [_to_hidden(kl_grad, w)] if beta is None else []
        return outputs, neg_grad

    (value, kl, lse, lse_ref, *grads_h), cached = _map_chunks(
        values, trained and training, w, h, h_ref, target
    )
    softmax = _softmax_from(lse)

    def neg_grad_of_kl(z: mx.array, rows: slice, part: slice) -> mx.array:
        z_ref = _logits(h_ref[rows], w_ref[part])
        p, p_ref = softmax(z, rows, part), _softmax_from(lse_ref)(z_ref, rows, part)
        return -fused.kl_grad(z, p, lse[rows], z_ref, p_ref, lse_ref[rows], kl[rows], direction)

    def neg_grad_of_both(z: mx.array, rows: slice, part: slice) -> mx.array:
        return softmax(z, rows, part) - (beta or 0.0) * neg_grad_of_kl(z, rows, part)

    neg_grad = fused.NegGrad(softmax if beta is None else neg_grad_of_both, cached, target)
    value = _with_gradient(value, h, w, grads_h[:1], neg_grad, trained, rows)
    if beta is None:
        kl_neg_grad = fused.NegGrad(neg_grad_of_kl, [])
        kl_with_grad = _with_gradient(kl, h, w, grads_h[1:], kl_neg_grad, trained, rows)
        return value[:, 0], kl_with_grad[:, 0]
    return value[:, 0], kl[:, 0]


def _logits(h: mx.array, w: Head) -> mx.array:
    """[n, v] float32 logits; see engines/fused.py for heads in half precision."""
    if isinstance(w, PackedHead):
        return w.logits(h)
    if w.dtype == mx.float32:
        return h @ w.T
    parts: list[mx.array] = []
    for part in fused.chunks(*w.shape):
        parts.append(h @ _rows(w, part, parts).T)
    return mx.concatenate(parts, axis=-1)


def _to_hidden(grad: mx.array, w: Head) -> mx.array:
    """The gradient with respect to the hidden states, [n, d], from the one with respect to the logits."""
    if isinstance(w, PackedHead):
        return w.to_hidden(grad)
    if w.dtype == mx.float32:
        return grad @ w
    found: list[mx.array] = []
    for part in fused.chunks(*w.shape):
        product = grad[:, part] @ _rows(w, part, found)
        found = [found[0] + product if found else product]
    return found[0]


def _rows(w: mx.array, part: slice, after: list[mx.array]) -> mx.array:
    """A part of the head in float32, made only when the last of ``after`` is there."""
    rows = mx.depends([w[part]], after[-1:])[0] if after else w[part]
    return rows.astype(mx.float32)


def _dense(w: Head, ids: mx.array) -> mx.array:
    """[n, d] rows of the head."""
    return w[ids].dense() if isinstance(w, PackedHead) else w[ids]


def _gather(z: mx.array, target: mx.array) -> mx.array:
    return mx.take_along_axis(z, target[:, None], axis=-1)


def _softmax_from(lse: mx.array) -> Callable[[mx.array, slice, slice], mx.array]:
    return lambda z, rows, _: exp_below(z, lse[rows])


def _map_chunks(
    function: Callable[..., tuple[list[mx.array], mx.array]], cache: bool, w: Head, *rows: mx.array
) -> tuple[list[mx.array], list[mx.array]]:
    """Call ``function`` on chunks of ``rows``, without gradient.

    Returns its arrays, joined along the positions, and the gradients to cache, one array for each of the
    first chunks.
    """
    count = rows[0].shape[0]
    limit = fused.cached_positions(count, w.shape[0]) if cache else 0
    parts: list[list[mx.array]] = []
    cached: list[mx.array] = []
    for part in fused.chunks(count, w.shape[0]):
        chunk = [mx.stop_gradient(a[part]) for a in rows]
        # MLX chooses its own order of work: without this dependency it may hold the logits of all chunks at
        # once.
        outputs, neg_grad = function(*(mx.depends(chunk, parts[-1]) if parts else chunk))
        parts.append(outputs)
        if part.stop <= limit:
            cached.append(mx.stop_gradient(neg_grad.astype(w.dtype)))
    return [mx.stop_gradient(mx.concatenate(list(arrays))) for arrays in zip(*parts, strict=True)], cached


def _with_gradient(
    value: mx.array,
    h: mx.array,
    w: Head,
    grad_h: list[mx.array],
    neg_grad: fused.NegGrad,
    trained: bool,
    rows: Rows,
) -> mx.array:
    """Give ``value`` [N, 1] its gradient: ``grad_h`` [N, d] where it was streamed, else from ``neg_grad``."""
    if grad_h:
        # what is added is zero
        found = value + mx.sum((h - mx.stop_gradient(h)) * grad_h[0], axis=-1, keepdims=True)
    else:
        found = _attach_gradient(value, h, w, neg_grad, trained)
    if rows is None:
        return found
    # The gradient of the rows comes from their own few logits; what is added is zero.
    z = _logits(mx.stop_gradient(h), rows[1].astype(h.dtype))
    minus = mx.stop_gradient(fused.neg_grad_of(neg_grad, mx.stop_gradient(z), rows[0]))
    return found - mx.sum(minus * (z - mx.stop_gradient(z)), axis=-1, keepdims=True)


def _attach_gradient(
    value: mx.array, h: mx.array, w: Head, neg_grad: fused.NegGrad, trained: bool
) -> mx.array:
    """``value`` with its gradients with respect to h and, when ``trained``, w.

    They come from what was cached and from other logits, formed again. The backward pass takes a part of the
    vocabulary at a time, so that each part of w's gradient is complete when it is made.
    """

    @mx.custom_function
    def attach(h: mx.array, value: mx.array, *w: mx.array) -> mx.array:
        return value

    @attach.vjp
    def attach_vjp(primals: Sequence[mx.array], cotangent: mx.array, _: Any) -> list[mx.array]:
        h, value = primals[:2]
        head = primals[2] if trained else w
        g = cotangent.astype(h.dtype)
        weighted, d_h = -g * h, mx.zeros(h.shape, h.dtype)
        rest = slice(sum(chunk.shape[0] for chunk in neg_grad.cached), h.shape[0])
        d_w: list[mx.array] = []
        for part in fused.chunks(head.shape[0], h.shape[0]):
            hidden = mx.depends([h], [d_h, *d_w[-1:]])[0]
            rows = [chunk[:, part] for chunk in neg_grad.cached]
            if rest.start < rest.stop:
                rows.append(neg_grad.at(_logits(hidden[rest], head[part]), rest, part))
            neg_grads = mx.concatenate(rows)
            if isinstance(head, PackedHead):
                d_h = d_h + head[part].to_hidden(neg_grads)
            else:
                d_h = mx.addmm(d_h, neg_grads, head[part])
            if trained:
                d_w.append(_head_gradient(neg_grads, weighted))
        d_h = -g * d_h
        if neg_grad.target is not None:
            d_h = d_h + g * _dense(head, neg_grad.target)
        if not trained:
            return [d_h, mx.zeros_like(value)]
        d_head = mx.concatenate(d_w)
        if neg_grad.target is not None:
            d_head = d_head.at[neg_grad.target].add(g * h)
        return [d_h, mx.zeros_like(value), d_head.astype(head.dtype)]

    attached: Any = attach(h, value, *([w] if trained else []))
    return attached


def _head_gradient(neg_grad: mx.array, weighted: mx.array) -> mx.array:
    return neg_grad.T @ weighted
