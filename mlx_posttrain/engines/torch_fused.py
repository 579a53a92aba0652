"""Log-probabilities, entropies and divergences from hidden states, on torch, a chunk of positions at a time. See fused.py.

Shapes: N positions, d width, V vocabulary entries; h: [N, d] hidden states; w: [V, d] the head's weight; target: [N] token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlx_posttrain.engines import fused

Tensor = torch.Tensor
#: slope_at(z, cotangents, part): d loss / d z, [N, v], at the logits z of ``part`` of the vocabulary; see ``_Recompute``.
Slope = Callable[[Tensor, Sequence[Tensor], slice], Tensor]


def logprobs(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """[N] log-probabilities of the targets."""
    steered = _steered(h, w)

    def values(h: Tensor, target: Tensor) -> list[Tensor]:
        z = _logits(h, w)
        if not steered:
            lse = torch.logsumexp(z, dim=-1, keepdim=True)
            return [_at(z, target) - lse, lse]
        p, lse = fused.softmax(z)
        return [_at(z, target) - lse, w[target] - _times(p, w)]

    value, other = _sweep(values, w, h, target)
    return _steer(value, h, other)[:, 0] if steered else _Recompute.apply(h, w, _logprob_slope(other), target, value)[0][:, 0]


def logprobs_and_entropy(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] entropies, whose gradient is recomputed: PPO only reports them."""
    steered = _steered(h, w)

    def values(h: Tensor, target: Tensor) -> list[Tensor]:
        z = _logits(h, w)
        p, lse = fused.softmax(z)
        return [_at(z, target) - lse, fused.entropy(z, p, lse), lse] + ([w[target] - _times(p, w)] if steered else [])

    value, entropy, lse, *slope = _sweep(values, w, h, target)

    def slope_at(z: Tensor, cotangents: Sequence[Tensor], _: slice) -> Tensor:
        return cotangents[0] * fused.entropy_slope(z, _softmax_of(z, lse), lse, entropy)

    (with_gradient,) = _Recompute.apply(h, w, slope_at, None, entropy)
    value = _steer(value, h, slope[0]) if steered else _Recompute.apply(h, w, _logprob_slope(lse), target, value)[0]
    return value[:, 0], with_gradient[:, 0]


def logprobs_and_kl(
    h: Tensor, w: Tensor, h_ref: Tensor, w_ref: Tensor, target: Tensor, direction: str, beta: float | None = None
) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] divergences from the reference, into which no gradient flows.

    beta: what :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl` says; a steered gradient then hangs on the log-probabilities alone.
    """
    steered = _steered(h, w)

    def values(h: Tensor, h_ref: Tensor, target: Tensor) -> list[Tensor]:
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

    def slope_at(z: Tensor, cotangents: Sequence[Tensor], part: slice) -> Tensor:
        z_ref = _logits(h_ref, w_ref[part])
        p, p_ref = _softmax_of(z, lse), _softmax_of(z_ref, lse_ref)
        slope = fused.kl_slope(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
        return slope.mul_(cotangents[1]).sub_(p.mul_(cotangents[0]))

    with_gradient = _Recompute.apply(h, w, slope_at, target, value, kl)
    return with_gradient[0][:, 0], with_gradient[1][:, 0]


def _steered(h: Tensor, w: Tensor) -> bool:
    return torch.is_grad_enabled() and h.requires_grad and not w.requires_grad


def _logits(h: Tensor, w: Tensor) -> Tensor:
    return (h @ w.T).float()


def _times(slope: Tensor, w: Tensor) -> Tensor:
    return slope.to(w.dtype) @ w


def _at(z: Tensor, target: Tensor) -> Tensor:
    return z.gather(-1, target[:, None])


def _softmax_of(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse).exp_()


def _logprob_slope(lse: Tensor) -> Slope:
    return lambda z, cotangents, _: _softmax_of(z, lse).mul_(-cotangents[0])


@torch.no_grad()
def _sweep(function: Callable[..., list[Tensor]], w: Tensor, *rows: Tensor) -> list[Tensor]:
    """``function`` over chunks of ``rows``, without gradient; its arrays, joined along the positions.

    Nothing that a chunk has allocated outlives it: a small array between two large ones keeps glibc before 2.38 from putting the next chunk's
    logits where these were, and all chunks' logits would be there at last.
    """
    count = rows[0].shape[0]
    joined: list[Tensor] = []
    for part in fused.chunks(count, w.shape[0]):
        found = function(*(a[part] for a in rows))
        joined = joined or [a.new_empty((count, *a.shape[1:])) for a in found]
        for whole, a in zip(joined, found, strict=True):
            whole[part] = a
        del found, a
    return joined


def _steer(value: Tensor, h: Tensor, slope: Tensor) -> Tensor:
    """``value`` [N, 1] whose gradient with respect to ``h`` is ``slope`` [N, d]: what is added is zero."""
    return value + ((h - h.detach()) * slope).sum(-1, keepdim=True)


class _Recompute(torch.autograd.Function):
    """``values`` [N, 1], whose gradients with respect to h and w come from forming the logits again.

    Now that the log-sum-exp is known, a part of the vocabulary at a time: each part of w's gradient is complete when it is made. The 1 that
    a log-probability's slope has at its target is left out of ``slope_at``, and added where ``target`` is given, for the first value.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, slope_at: Slope, target: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(h, w)
        ctx.kept = slope_at, target
        return tuple(v.clone() for v in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        h, w = ctx.saved_tensors
        slope_at, target = ctx.kept
        d_h = torch.zeros_like(h)
        d_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        for part in fused.chunks(w.shape[0], h.shape[0]):
            slope = slope_at(_logits(h, w[part]), cotangents, part).to(w.dtype)
            d_h.addmm_(slope, w[part])
            if d_w is not None:
                _head_gradient(slope, h, d_w[part])
        if target is not None:
            g = cotangents[0].to(h.dtype)
            d_h += g * w[target]
            if d_w is not None:
                d_w.index_add_(0, target, g * h)
        return d_h, d_w, None, None, *(None for _ in cotangents)


def _head_gradient(slope: Tensor, h: Tensor, out: Tensor) -> None:
    torch.mm(slope.T, h, out=out)
