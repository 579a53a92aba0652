"""GPT-2's activation for MLX's CPU backend, which computes tanh and exp one element at a time.

MLX's own ``nn.gelu_approx`` takes nine times as long forward and seven times as long with its gradient on
[1024, 768] (two cores, compiled); it was 40 % of a training step of the embedded model. Here tanh is a ratio
of polynomials, a few multiplications that the compiler vectorises. MLX's own function stays on the GPU, and
is the reference in tests/engines/test_mlx_gelu.py.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_K = math.sqrt(2.0 / math.pi)
_C = 0.044715


def _tanh(x: mx.array) -> mx.array:
    """tanh to float32 accuracy (1.5e-7 absolute).

    Lambert's continued fraction (1770), cut after seven terms, is exact to 1e-9 on |x| < 9/4. The argument is
    quartered to get there, and tanh 2x = 2 tanh x / (1 + tanh^2 x) is applied twice to come back. Beyond 9
    tanh is 1 in float32.
    """
    x = mx.clip(x, -9.0, 9.0) * 0.25
    s = x * x
    t = x * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
    t = 2 * t / (1 + t * t)
    return 2 * t / (1 + t * t)


@mx.compile
def _forward(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + _tanh(_K * (x + _C * x * x * x)))


@mx.compile
def _backward(x: mx.array, cotangent: mx.array) -> mx.array:
    t = _tanh(_K * (x + _C * x * x * x))
    return cotangent * 0.5 * (1 + t + x * (1 - t * t) * _K * (1 + 3 * _C * x * x))


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """x [..] -> gelu(x) [..], the tanh form (Hendrycks & Gimpel 2016, section 2)."""
    return _forward(x)


@gelu.vjp
def _gelu_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> mx.array:
    return _backward(primals[0] if isinstance(primals, list | tuple) else primals, cotangent)


def use_in(net: nn.Module) -> None:
    """Give the MLPs of a float32 GPT-2 this activation when MLX runs on the CPU.

    Nothing else of the model changes.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return
    from mlx_lm.models.gpt2 import MLP

    class FastMLP(MLP):
        activation = staticmethod(gelu)

        def __call__(self, x: mx.array) -> mx.array:
            return self.c_proj(gelu(self.c_fc(x)))

    for module in net.modules():
        if type(module) is MLP:
            module.__class__ = FastMLP
