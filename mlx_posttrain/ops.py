"""The array names that losses need, chosen by the library of the argument (after einops' dispatch on type).

A loss is written once against these names plus the operators and methods that all three libraries share, and
then runs on MLX arrays (training on Apple Silicon or Linux), torch tensors (training on any CPU) and NumPy
arrays (float64 truth in tests).

    xp = ops(logprobs)
    loss = -xp.sum(xp.log_sigmoid(logprobs))

Conventions: ``axis`` and ``keepdims`` as in NumPy; integer index arrays for ``take_along_axis`` have the same
number of dimensions as the data; ``stop_gradient`` is the identity where there are no gradients.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any


def ops(x: Any) -> SimpleNamespace:
    """Return the namespace for ``x``'s library.

    Raises TypeError for anything that is not an MLX array, a torch tensor or a NumPy array.
    """
    library = type(x).__module__.partition(".")[0]
    try:
        return _NAMESPACES[library]()
    except KeyError:
        raise TypeError(
            f"expected an mlx, torch or numpy array, got {type(x).__module__}.{type(x).__name__}"
        ) from None


@cache
def _numpy() -> SimpleNamespace:
    import numpy as np

    def logsumexp(x, axis=-1, keepdims=False):
        top = np.max(x, axis=axis, keepdims=True)
        out = top + np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True))
        return out if keepdims else np.squeeze(out, axis=axis)

    def log_sigmoid(x):
        return -np.logaddexp(0.0, -x)

    return SimpleNamespace(
        exp=np.exp,
        log=np.log,
        log1p=np.log1p,
        expm1=np.expm1,
        sqrt=np.sqrt,
        abs=np.abs,
        tanh=np.tanh,
        where=np.where,
        maximum=np.maximum,
        minimum=np.minimum,
        clip=np.clip,
        sum=np.sum,
        mean=np.mean,
        max=np.max,
        cumsum=np.cumsum,
        argmax=np.argmax,
        argsort_descending=lambda x, axis=-1: np.argsort(-x, axis=axis, kind="stable"),
        stack=np.stack,
        concatenate=np.concatenate,
        take_along_axis=np.take_along_axis,
        zeros_like=np.zeros_like,
        ones_like=np.ones_like,
        logsumexp=logsumexp,
        softmax=lambda x, axis=-1: np.exp(x - logsumexp(x, axis=axis, keepdims=True)),
        log_softmax=lambda x, axis=-1: x - logsumexp(x, axis=axis, keepdims=True),
        sigmoid=lambda x: np.exp(log_sigmoid(x)),
        log_sigmoid=log_sigmoid,
        stop_gradient=lambda x: x,
        astype=lambda x, like: x.astype(like.dtype),
    )


@cache
def _mlx() -> SimpleNamespace:
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_posttrain.engines.mlx_exp import logsumexp, softmax

    def log_softmax(x, axis=-1):
        return x - logsumexp(x, axis=axis, keepdims=True)

    return SimpleNamespace(
        exp=mx.exp,
        log=mx.log,
        log1p=mx.log1p,
        expm1=mx.expm1,
        sqrt=mx.sqrt,
        abs=mx.abs,
        tanh=mx.tanh,
        where=mx.where,
        maximum=mx.maximum,
        minimum=mx.minimum,
        clip=mx.clip,
        sum=mx.sum,
        mean=mx.mean,
        max=mx.max,
        cumsum=mx.cumsum,
        argmax=mx.argmax,
        argsort_descending=lambda x, axis=-1: mx.argsort(-x, axis=axis),
        stack=mx.stack,
        concatenate=mx.concatenate,
        take_along_axis=mx.take_along_axis,
        zeros_like=mx.zeros_like,
        ones_like=mx.ones_like,
        logsumexp=logsumexp,
        softmax=softmax,
        log_softmax=log_softmax,
        sigmoid=mx.sigmoid,
        log_sigmoid=nn.log_sigmoid,
        stop_gradient=mx.stop_gradient,
        astype=lambda x, like: x.astype(like.dtype),
    )


@cache
def _torch() -> SimpleNamespace:
    import torch
    import torch.nn.functional as F

    def reduce(function):
        def reduced(x, axis=None, keepdims=False):
            return function(x) if axis is None else function(x, dim=axis, keepdim=keepdims)

        return reduced

    def extreme(function):
        def pairwise(a, b):
            # NumPy and MLX take a number on either side; torch wants two tensors.
            like = a if isinstance(a, torch.Tensor) else b
            return function(torch.as_tensor(a, dtype=like.dtype), torch.as_tensor(b, dtype=like.dtype))

        return pairwise

    return SimpleNamespace(
        exp=torch.exp,
        log=torch.log,
        log1p=torch.log1p,
        expm1=torch.expm1,
        sqrt=torch.sqrt,
        abs=torch.abs,
        tanh=torch.tanh,
        where=torch.where,
        maximum=extreme(torch.maximum),
        minimum=extreme(torch.minimum),
        clip=torch.clamp,
        sum=reduce(torch.sum),
        mean=reduce(torch.mean),
        max=reduce(torch.amax),
        cumsum=lambda x, axis: torch.cumsum(x, dim=axis),
        argmax=lambda x, axis=-1: torch.argmax(x.int() if x.dtype == torch.bool else x, dim=axis),
        argsort_descending=lambda x, axis=-1: torch.argsort(x, dim=axis, descending=True, stable=True),
        stack=lambda xs, axis=0: torch.stack(xs, dim=axis),
        concatenate=lambda xs, axis=0: torch.cat(xs, dim=axis),
        take_along_axis=lambda x, index, axis: torch.take_along_dim(x, index.long(), dim=axis),
        zeros_like=torch.zeros_like,
        ones_like=torch.ones_like,
        logsumexp=lambda x, axis=-1, keepdims=False: torch.logsumexp(x, dim=axis, keepdim=keepdims),
        softmax=lambda x, axis=-1: F.softmax(x, dim=axis),
        log_softmax=lambda x, axis=-1: F.log_softmax(x, dim=axis),
        sigmoid=torch.sigmoid,
        log_sigmoid=F.logsigmoid,
        stop_gradient=lambda x: x.detach(),
        astype=lambda x, like: x.to(like.dtype),
    )


_NAMESPACES = {"numpy": _numpy, "mlx": _mlx, "torch": _torch}
