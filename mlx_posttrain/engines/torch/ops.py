"""The namespace of ``mlx_posttrain.ops`` for torch tensors."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def reduce(function):
    def reduced(x, axis=None, keepdims=False):
        return function(x) if axis is None else function(x, dim=axis, keepdim=keepdims)

    return reduced


def extreme(function):
    def pairwise(a, b):
        # NumPy and MLX accept a number on either side; torch needs two tensors.
        like = a if isinstance(a, torch.Tensor) else b
        return function(torch.as_tensor(a, dtype=like.dtype), torch.as_tensor(b, dtype=like.dtype))

    return pairwise


def segment_sum(values, segments, count):
    return values.new_zeros(count).index_add(0, segments.long(), values)


NAMESPACE = SimpleNamespace(
    segment_sum=segment_sum,
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
