"""Log-probabilities, entropies and divergences from hidden states, a chunk of positions at a time, on torch.

engines/fused.py says how, and what *streamed* and *cached* mean.

The gradient of a weight of V rows is as large as the weight. Autograd would allocate it again for every use
in every micro-batch, for an embedding filled with zeros first, and add it to the others. Here contributions
are added to ``w.grad`` in place, so only ``Tensor.backward`` finds them.

Shapes: N positions, d hidden size, V vocabulary entries; h: [N, d] float32 hidden states; w: [V, d] the
head's weight; target: [N] token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlx_posttrain.engines import fused

Tensor = torch.Tensor
Rows = tuple[Tensor, Tensor] | None


def logprobs(h: Tensor, w: Tensor, target: Tensor, rows: Rows = None) -> Tensor:
    """[N] log-probabilities of the targets.

    rows: ids [n] and rows [n, d] of a frozen w, in which they stand, that are trained.
    """
    streamed, trained = _gradient_mode(h, w)

    def values(cache: bool, h: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z = logits(h, w)
        p, lse = fused.softmax(z)
        return [
            _gather(z, target) - lse,
            lse,
            *([w[target] - _to_hidden(p, w)] if streamed else []),
        ], p if cache else None

    (value, lse, *grad_h), cached = _map_chunks(values, trained, w, h, target)
    neg_grad = fused.NegGrad(_softmax_from(lse), cached, target)
    return _with_gradient(value, h, w, grad_h, neg_grad, trained, rows)[:, 0]


def logprobs_and_entropy(h: Tensor, w: Tensor, target: Tensor, rows: Rows = None) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] entropies.

    The gradient of the entropies is recomputed, since PPO only reports them. rows: as in :func:`logprobs`.
    """
    streamed, trained = _gradient_mode(h, w)

    def values(cache: bool, h: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z = logits(h, w)
        p, lse = fused.softmax(z)
        outputs = [_gather(z, target) - lse, fused.entropy(z, p, lse), lse]
        return [*outputs, *([w[target] - _to_hidden(p, w)] if streamed else [])], p if cache else None

    (value, entropy, lse, *grad_h), cached = _map_chunks(values, trained, w, h, target)
    softmax = _softmax_from(lse)

    def neg_grad_of_entropy(z: Tensor, rows: slice, part: slice) -> Tensor:
        return -fused.entropy_grad(z, softmax(z, rows, part), lse[rows], entropy[rows])

    value = _with_gradient(value, h, w, grad_h, fused.NegGrad(softmax, cached, target), trained, rows)
    entropy_neg_grad = fused.NegGrad(neg_grad_of_entropy, [])
    attach = trained or streamed
    return value[:, 0], _with_gradient(entropy, h, w, [], entropy_neg_grad, attach, rows)[:, 0]


def logprobs_and_kl(
    h: Tensor,
    w: Tensor,
    h_ref: Tensor,
    w_ref: Tensor,
    target: Tensor,
    direction: str,
    beta: float | None = None,
    rows: Rows = None,
) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities of the targets and [N] divergences from the reference.

    No gradient flows into the reference. beta: as in
    :meth:`mlx_posttrain.engines.base.Model.logprobs_and_kl`; the log-probabilities alone then carry the
    gradient of both. rows: as in :func:`logprobs`.
    """
    streamed, trained = _gradient_mode(h, w)

    def values(cache: bool, h: Tensor, h_ref: Tensor, target: Tensor) -> tuple[list[Tensor], Tensor | None]:
        z, z_ref = logits(h, w), logits(h_ref, w_ref)
        (p, lse), (p_ref, lse_ref) = fused.softmax(z), fused.softmax(z_ref)
        kl = fused.kl(z, p, lse, z_ref, p_ref, lse_ref, direction)
        outputs = [_gather(z, target) - lse, kl, lse, lse_ref]
        if not streamed and (not cache or beta is None):
            return outputs, p if cache else None
        kl_grad = fused.kl_grad(z, p, lse, z_ref, p_ref, lse_ref, kl, direction)
        neg_grad = p if beta is None else p + beta * kl_grad
        if streamed:
            outputs += [w[target] - _to_hidden(neg_grad, w)]
            outputs += [_to_hidden(kl_grad, w)] if beta is None else []
        return outputs, neg_grad if cache else None

    (value, kl, lse, lse_ref, *grads_h), cached = _map_chunks(values, trained, w, h, h_ref, target)
    softmax = _softmax_from(lse)

    def neg_grad_of_kl(z: Tensor, rows: slice, part: slice) -> Tensor:
        z_ref = logits(h_ref[rows], w_ref[part])
        p, p_ref = softmax(z, rows, part), _softmax_from(lse_ref)(z_ref, rows, part)
        return -fused.kl_grad(z, p, lse[rows], z_ref, p_ref, lse_ref[rows], kl[rows], direction)

    def neg_grad_of_both(z: Tensor, rows: slice, part: slice) -> Tensor:
        return softmax(z, rows, part) - (beta or 0.0) * neg_grad_of_kl(z, rows, part)

    neg_grad = fused.NegGrad(softmax if beta is None else neg_grad_of_both, cached, target)
    value = _with_gradient(value, h, w, grads_h[:1], neg_grad, trained, rows)
    if beta is None:
        kl_neg_grad = fused.NegGrad(neg_grad_of_kl, [])
        kl_with_grad = _with_gradient(kl, h, w, grads_h[1:], kl_neg_grad, trained, rows)
        return value[:, 0], kl_with_grad[:, 0]
    return value[:, 0], kl[:, 0]


def embed(tokens: Tensor, w: Tensor) -> Tensor:
    """[..., d] rows of the embedding ``w`` [V, d] for ids ``tokens`` [...].

    The gradient is added to ``w.grad`` in place.
    """
    return _Embedding.apply(tokens, w)


def _gradient_mode(h: Tensor, w: Tensor) -> tuple[bool, bool]:
    """(streamed, trained): how the gradient is made, see engines/fused.py; neither where none is wanted."""
    wanted = torch.is_grad_enabled()
    return wanted and h.requires_grad and not w.requires_grad, wanted and w.requires_grad


def logits(h: Tensor, w: Tensor) -> Tensor:
    """[n, v] float32 logits of hidden states [n, d] for the rows of w [v, d]."""
    if w.dtype != torch.float32:  # see engines/fused.py
        z = h.new_empty((len(h), len(w)))
        for part in fused.chunks(*w.shape):
            z[:, part] = h @ w[part].float().T
        return z
    return h @ w.T


def _to_hidden(grad: Tensor, w: Tensor) -> Tensor:
    """The gradient with respect to the hidden states, [n, d], from the one with respect to the logits."""
    if w.dtype == torch.float32:
        return grad @ w
    found = grad.new_zeros((len(grad), w.shape[1]))
    for part in fused.chunks(*w.shape):
        found.addmm_(grad[:, part], w[part].float())
    return found


def _gather(z: Tensor, target: Tensor) -> Tensor:
    return z.gather(-1, target[:, None])


def _softmax_from(lse: Tensor) -> Callable[[Tensor, slice, slice], Tensor]:
    return lambda z, rows, _: (z - lse[rows]).exp_()


@torch.no_grad()
def _map_chunks(
    function: Callable[..., tuple[list[Tensor], Tensor | None]], cache: bool, w: Tensor, *rows: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Call ``function`` on chunks of ``rows``, without gradient.

    Returns its arrays, joined along the positions, and the gradients to cache, one array for each of the
    first chunks.

    Nothing else that a chunk has allocated outlives it: a small array between two large ones keeps glibc
    before 2.38 from putting the next chunk's logits in the place of this one's, and in the end the logits of
    all chunks would be held.
    """
    count = rows[0].shape[0]
    limit = fused.cached_positions(count, w.shape[0]) if cache else 0
    joined: list[Tensor] = []
    cached: list[Tensor] = []
    for part in fused.chunks(count, w.shape[0]):
        outputs, neg_grad = function(part.stop <= limit, *(a[part] for a in rows))
        joined = joined or [a.new_empty((count, *a.shape[1:])) for a in outputs]
        for destination, a in zip(joined, outputs, strict=True):
            destination[part] = a
        if neg_grad is not None:
            cached.append(neg_grad.to(w.dtype))
        del outputs, a, neg_grad
    return joined, cached


def _with_gradient(
    value: Tensor,
    h: Tensor,
    w: Tensor,
    grad_h: list[Tensor],
    neg_grad: fused.NegGrad,
    attach: bool,
    rows: Rows,
) -> Tensor:
    """Give ``value`` [N, 1] its gradient: ``grad_h`` [N, d] where it was streamed, else from ``neg_grad``.

    attach: whether there is a gradient to take from ``neg_grad``; without it ``value`` is returned as it is.
    """
    if grad_h:
        found = value + ((h - h.detach()) * grad_h[0]).sum(-1, keepdim=True)  # what is added is zero
    else:
        found = _AttachGradient.apply(value, h, w, neg_grad) if attach else value
    if rows is None or not torch.is_grad_enabled():
        return found
    # The gradient of the rows comes from their own few logits; what is added is zero.
    z = logits(h.detach(), rows[1].to(h.dtype))
    minus = fused.neg_grad_of(neg_grad, z.detach(), rows[0])
    return found - (minus * (z - z.detach())).sum(-1, keepdim=True)


class _AttachGradient(torch.autograd.Function):
    """``value`` [N, 1] with its gradients with respect to h and, added in place, w.

    They come from what was cached and from other logits, formed again.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, h: Tensor, w: Tensor, neg_grad: fused.NegGrad) -> Tensor:
        ctx.save_for_backward(h)
        # The weight itself: what saved_tensors returns may be a copy, whose gradient would be lost.
        ctx.w, ctx.neg_grad = w, neg_grad
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (h,), w = ctx.saved_tensors, ctx.w
        # The cached gradients would otherwise live as long as anything refers to the value.
        neg_grad, ctx.neg_grad = ctx.neg_grad, None
        g = g.to(h.dtype)
        d_h, weighted = torch.zeros_like(h), -g * h
        d_w = _grad_buffer(w) if w.requires_grad else None

        def add(neg_grads: Tensor, rows: slice, part: slice) -> None:
            neg_grads = neg_grads.float()
            d_h[rows].addmm_(neg_grads, w[part].float())
            if d_w is not None:
                _head_gradient(d_w[part], neg_grads, weighted[rows])

        begin = 0
        while neg_grad.cached:
            chunk = neg_grad.cached.pop(0)
            add(chunk, slice(begin, begin + len(chunk)), slice(None))
            begin += len(chunk)
            del chunk
        rest = slice(begin, len(h))
        for part in fused.chunks(w.shape[0], len(h) - begin) if begin < len(h) else []:
            add(neg_grad.at(logits(h[rest], w[part]), rest, part), rest, part)
        d_h *= -g
        if neg_grad.target is not None:
            d_h += g * w[neg_grad.target]
            if d_w is not None:
                d_w.index_add_(0, neg_grad.target, (g * h).to(d_w.dtype))
        return None, d_h, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, w: Tensor) -> Tensor:
        ctx.tokens, ctx.w = tokens, w
        return torch.nn.functional.embedding(tokens, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        _grad_buffer(ctx.w).index_add_(0, ctx.tokens.flatten(), g.flatten(0, -2))
        return None, None


def _grad_buffer(w: Tensor) -> Tensor:
    if w.grad is None:
        w.grad = torch.zeros_like(w)
    return w.grad


def _head_gradient(d_w: Tensor, neg_grad: Tensor, weighted: Tensor) -> None:
    if d_w.dtype == torch.float32:
        d_w.addmm_(neg_grad.T, weighted)
    else:
        d_w += neg_grad.T @ weighted
