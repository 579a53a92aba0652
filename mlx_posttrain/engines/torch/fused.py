"""Log-probabilities, entropies and divergences from hidden states, on torch, a chunk of positions at a time.
See fused.py.

Shapes: N positions, d width, V vocabulary entries; h: [N, d] hidden states; w: [V, d] the head's weight;
target: [N] token ids.

A weight of V rows has a gradient as large, and autograd would make it anew for every use in every
micro-batch, for an embedding filled with zeros first, and add it to the others. Here what there is to add is
added to ``w.grad`` in place: only ``Tensor.backward`` finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_posttrain.engines import fused

Tensor = torch.Tensor


def logprobs(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """[N] log-probabilities of the targets."""
    steered, trained = _way(h, w)

    def values(keep: bool, h: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z = logits(h, w)
        p, lse = fused.softmax(z)
        return [
            _at(z, target) - lse,
            lse,
            *([w[target] - _times(p, w)] if steered else []),
        ], p if keep else None

    (value, lse, *slope), kept = _sweep(values, trained, w, h, target)
    return _with_gradient(value, h, w, slope, fused.Fall(_softmax_of(lse), kept, target), trained)[:, 0]


def logprobs_and_entropy(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] entropies, whose gradient is recomputed: PPO only reports
    them.
    """
    steered, trained = _way(h, w)

    def values(keep: bool, h: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z = logits(h, w)
        p, lse = fused.softmax(z)
        found = [_at(z, target) - lse, fused.entropy(z, p, lse), lse]
        return [*found, *([w[target] - _times(p, w)] if steered else [])], p if keep else None

    (value, entropy, lse, *slope), kept = _sweep(values, trained, w, h, target)
    softmax = _softmax_of(lse)

    def fall_of_entropy(z: Tensor, rows: slice, part: slice) -> Tensor:
        return -fused.entropy_slope(z, softmax(z, rows, part), lse[rows], entropy[rows])

    value = _with_gradient(value, h, w, slope, fused.Fall(softmax, kept, target), trained)
    return value[:, 0], _with_gradient(
        entropy, h, w, [], fused.Fall(fall_of_entropy, []), trained or steered
    )[:, 0]


def logprobs_and_kl(
    h: Tensor,
    w: Tensor,
    h_ref: Tensor,
    w_ref: Tensor,
    target: Tensor,
    direction: str,
    beta: float | None = None,
) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] divergences from the reference, into which no gradient
    flows.

    beta: what :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl` says; the gradient then hangs on the
    log-probabilities alone.
    """
    steered, trained = _way(h, w)

    def values(keep: bool, h: Tensor, h_ref: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z, z_ref = logits(h, w), logits(h_ref, w_ref)
        (p, lse), (p_ref, lse_ref) = fused.softmax(z), fused.softmax(z_ref)
        kl = fused.kl(z, p, lse, z_ref, p_ref, lse_ref, direction)
        found = [_at(z, target) - lse, kl, lse, lse_ref]
        if not steered and (not keep or beta is None):
            return found, p if keep else None
        slope = fused.kl_slope(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
        fall = p if beta is None else p + beta * slope
        if steered:
            found += [w[target] - _times(fall, w), *([_times(slope, w)] if beta is None else [])]
        return found, fall if keep else None

    (value, kl, lse, lse_ref, *slopes), kept = _sweep(values, trained, w, h, h_ref, target)
    softmax = _softmax_of(lse)

    def fall_of_kl(z: Tensor, rows: slice, part: slice) -> Tensor:
        z_ref = logits(h_ref[rows], w_ref[part])
        p, p_ref = softmax(z, rows, part), _softmax_of(lse_ref)(z_ref, rows, part)
        return -fused.kl_slope(z, p, lse[rows], z_ref, p_ref, lse_ref[rows], kl[rows], direction)

    def fall_of_both(z: Tensor, rows: slice, part: slice) -> Tensor:
        return softmax(z, rows, part) - (beta or 0.0) * fall_of_kl(z, rows, part)

    value = _with_gradient(
        value, h, w, slopes[:1], fused.Fall(softmax if beta is None else fall_of_both, kept, target), trained
    )
    divergence = (
        _with_gradient(kl, h, w, slopes[1:], fused.Fall(fall_of_kl, []), trained) if beta is None else kl
    )
    return value[:, 0], divergence[:, 0]


def embed(tokens: Tensor, w: Tensor) -> Tensor:
    """[..., d] rows of the embedding ``w`` [V, d] for ids ``tokens`` [...], whose gradient is added to
    ``w.grad`` in place.
    """
    return _Embedded.apply(tokens, w)


def _way(h: Tensor, w: Tensor) -> tuple[bool, bool]:
    """(steered, trained): which way to a gradient is taken, see fused.py; neither where none is wanted."""
    wanted = torch.is_grad_enabled()
    return wanted and h.requires_grad and not w.requires_grad, wanted and w.requires_grad


def logits(h: Tensor, w: Tensor) -> Tensor:
    """[n, v] float32 logits of hidden states [n, d] for the rows of w [v, d]."""
    # With few positions BLAS takes as little as two thirds of the time the other way round, and the copy to
    # rows costs a tenth of that; with many it costs more.
    return (h @ w.T if len(h) > 2 * fused.PANEL else (w @ h.T).T.contiguous()).float()


def _times(slope: Tensor, w: Tensor) -> Tensor:
    return slope.to(w.dtype) @ w


def _at(z: Tensor, target: Tensor) -> Tensor:
    return z.gather(-1, target[:, None])


def _softmax_of(lse: Tensor) -> Callable[[Tensor, slice, slice], Tensor]:
    return lambda z, rows, _: (z - lse[rows]).exp_()


@torch.no_grad()
def _sweep(
    function: Callable[..., tuple[list[Tensor], Tensor | None]], keep: bool, w: Tensor, *rows: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """``function`` over chunks of ``rows``, without gradient; its arrays, joined along the positions, and
    what it would have kept.

    Nothing else that a chunk has allocated outlives it: a small array between two large ones keeps glibc
    before 2.38 from putting the next chunk's logits where these were, and all chunks' logits would be there
    at last.
    """
    count = rows[0].shape[0]
    most = fused.kept(count, w.shape[0]) if keep else 0
    joined: list[Tensor] = []
    kept: list[Tensor] = []
    for part in fused.chunks(count, w.shape[0]):
        found, fall = function(part.stop <= most, *(a[part] for a in rows))
        joined = joined or [a.new_empty((count, *a.shape[1:])) for a in found]
        for whole, a in zip(joined, found, strict=True):
            whole[part] = a
        if fall is not None:
            kept.append(fall.to(w.dtype))
        del found, a, fall
    return joined, kept


def _with_gradient(
    value: Tensor, h: Tensor, w: Tensor, slope: list[Tensor], fall: fused.Fall, attach: bool
) -> Tensor:
    """``value`` [N, 1] steered by its slope [N, d] where there is one, or else, to ``attach``, with the
    gradient that ``fall`` says.
    """
    if slope:
        return value + ((h - h.detach()) * slope[0]).sum(-1, keepdim=True)  # what is added is zero
    return _Attached.apply(value, h, w, fall) if attach else value


class _Attached(torch.autograd.Function):
    """``value`` [N, 1] with its gradients with respect to h and, added in place, w: from what was kept, and
    from forming other logits again.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, h: Tensor, w: Tensor, fall: fused.Fall) -> Tensor:
        ctx.save_for_backward(h)
        # the weight itself: what saved_tensors gives may be a copy, and its gradient nobody's
        ctx.w, ctx.fall = w, fall
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (h,), w = ctx.saved_tensors, ctx.w
        fall, ctx.fall = ctx.fall, None  # what was kept would stay for as long as anybody holds the value
        g = g.to(h.dtype)
        d_h, weighted = torch.zeros_like(h), -g * h
        d_w = _own_gradient(w) if w.requires_grad else None

        def add(some: Tensor, rows: slice, part: slice) -> None:
            d_h[rows].addmm_(some, w[part])
            if d_w is not None:
                _head_gradient(d_w[part], some, weighted[rows])

        begin = 0
        while fall.kept:
            some = fall.kept.pop(0)
            add(some, slice(begin, begin + len(some)), slice(None))
            begin += len(some)
            del some
        rest = slice(begin, len(h))
        for part in fused.chunks(w.shape[0], len(h) - begin) if begin < len(h) else []:
            add(fall.at(logits(h[rest], w[part]), rest, part).to(w.dtype), rest, part)
        d_h *= -g
        if fall.target is not None:
            d_h += g * w[fall.target]
            if d_w is not None:
                d_w.index_add_(0, fall.target, g * h)
        return None, d_h, None, None


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, w: Tensor) -> Tensor:
        ctx.tokens, ctx.w = tokens, w
        return torch.nn.functional.embedding(tokens, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        _own_gradient(ctx.w).index_add_(0, ctx.tokens.flatten(), g.flatten(0, -2))
        return None, None


def _own_gradient(w: Tensor) -> Tensor:
    if w.grad is None:
        w.grad = torch.zeros_like(w)
    return w.grad


def _head_gradient(own: Tensor, fall: Tensor, weighted: Tensor) -> None:
    own.addmm_(fall.T, weighted)
