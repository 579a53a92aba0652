"""The names for NumPy arrays: the float64 truth of tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


def logsumexp(x, axis=-1, keepdims=False):
    top = np.max(x, axis=axis, keepdims=True)
    out = top + np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True))
    return out if keepdims else np.squeeze(out, axis=axis)


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def segment_sum(values, segments, count):
    return np.bincount(segments, weights=values, minlength=count).astype(values.dtype)


NAMESPACE = SimpleNamespace(
    segment_sum=segment_sum,
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
