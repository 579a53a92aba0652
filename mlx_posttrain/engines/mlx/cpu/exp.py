"""Exp, softmax and log-sum-exp for MLX's CPU backend on Linux, which computes exp one element at a time.

Training takes V exponentials per position at the head, forward and backward. Here exp is a polynomial and a
shift of bits, which the compiler vectorises: a quarter of the time. MLX's own functions stay on a Mac and on
any GPU, and are the reference in tests/engines/test_mlx_exp.py. Logits must be below infinity here: inf gives
nan.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import mlx.core as mx


def is_scalar() -> bool:
    """Whether MLX's own exp computes one element at a time here."""
    return sys.platform == "linux" and mx.default_device() == mx.Device(mx.cpu)


def _fast(x: mx.array) -> bool:
    return is_scalar() and x.dtype == mx.float32


# Coefficients of 2^f on [-1, 0], interpolated at Chebyshev's points: accurate to 3e-9.
_C = (0.999999999, 0.693147045, 0.240224331, 0.0554909321, 0.00957985997, 0.00127554014, 0.000109328924)


@mx.compile
def _factors(z: mx.array, top: mx.array) -> tuple[mx.array, mx.array]:
    """2^f and, in bits, 2^k, with f + k = log2 exp(z - top).

    The polynomial is evaluated in Estrin's order, which MLX fuses into one loop. k is t rounded up by a
    conversion, for which every x86-64 has a vector instruction; for floor only newer ones have one.
    """
    t = mx.maximum((z - top) * math.log2(math.e), -127.0)  # below that 2^k has no bits and is 0
    k = t.astype(mx.int32)
    f = t - k.astype(mx.float32)
    f2 = f * f
    q = ((_C[0] + _C[1] * f) + (_C[2] + _C[3] * f) * f2) + ((_C[4] + _C[5] * f) + _C[6] * f2) * (f2 * f2)
    return q, mx.left_shift(k + 127, 23)


def _exp(z: mx.array, top: mx.array) -> mx.array:
    """exp(z - top) for z <= top; 0 from 2^-127 down.

    The relative error, |z - top| 1e-7, is what rounding z - top costs any exp.
    """
    q, bits = _factors(z, top)
    return q * bits.view(mx.float32)


def exp_below(z: mx.array, top: mx.array) -> mx.array:
    """exp(z - top) where no element of z is above ``top``, without a gradient.

    top: an array of z's shape, or with a last dimension of 1.
    """
    return _exp(z, top) if _fast(z) else mx.exp(z - top)


def _shifted(z: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(max z, exp(z - max z), its sum) along the last axis."""
    top = mx.max(z, axis=-1, keepdims=True)
    e = _exp(z, top)
    return top, e, mx.sum(e, axis=-1, keepdims=True)


@mx.custom_function
def _softmax(z: mx.array) -> mx.array:
    _, e, total = _shifted(z)
    return e / total


@_softmax.vjp
def _softmax_vjp(primals: Any, cotangent: mx.array, p: mx.array) -> mx.array:
    inner = cotangent * p
    return inner - p * mx.sum(inner, axis=-1, keepdims=True)


@mx.custom_function
def _logsumexp(z: mx.array) -> mx.array:
    top, _, total = _shifted(z)
    return top + mx.log(total)


@_logsumexp.vjp
def _logsumexp_vjp(primals: Any, cotangent: mx.array, lse: mx.array) -> mx.array:
    z = primals[0] if isinstance(primals, list | tuple) else primals
    return cotangent * _exp(z, lse)


def softmax(z: mx.array, axis: int = -1) -> mx.array:
    """Softmax along ``axis``, of z's shape."""
    p: Any = _softmax(z) if axis == -1 and _fast(z) else mx.softmax(z, axis=axis)
    return p


def softmax_and_lse(z: mx.array) -> tuple[mx.array, mx.array]:
    """Softmax along the last axis and the log-sum-exp, [..., 1], without a gradient.

    With the exp of this module both take one exponential per element.
    """
    if not _fast(z):
        return mx.softmax(z, axis=-1), mx.logsumexp(z, axis=-1, keepdims=True)
    top, e, total = _shifted(z)
    return e / total, top + mx.log(total)


def logsumexp(z: mx.array, axis: Any = -1, keepdims: bool = False) -> mx.array:
    """log sum exp z along ``axis``."""
    if axis != -1 or not _fast(z):
        return mx.logsumexp(z, axis=axis, keepdims=keepdims)
    lse: Any = _logsumexp(z)
    return lse if keepdims else lse[..., 0]
