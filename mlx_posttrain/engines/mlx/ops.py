"""The namespace of ``mlx_posttrain.ops`` for MLX arrays."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from mlx_posttrain.engines.mlx.cpu.exp import logsumexp, softmax


def log_softmax(x, axis=-1):
    return x - logsumexp(x, axis=axis, keepdims=True)


def segment_sum(values, segments, count):
    # A sum over a 0/1 matrix instead of a scatter: the same result on every device and in every order.
    member = segments[None, :] == mx.arange(count)[:, None]
    return mx.where(member, values[None, :], mx.zeros_like(values)[None, :]).sum(axis=1)


NAMESPACE = SimpleNamespace(
    segment_sum=segment_sum,
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
