"""The fast activation against mlx's own and against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("mlx.core")


def truth(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative in float64."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    t = np.tanh(k * (x + c * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * k * (1 + 3 * c * x**2)


def test_value_and_gradient():
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_posttrain.engines.mlx.cpu.gelu import gelu

    grid = np.concatenate([np.linspace(-30, 30, 60_001), [0.0, 1e-30, -1e-30, 1e4, -1e4]]).astype(np.float32)
    value, derivative = truth(grid.astype(np.float64))
    x = mx.array(grid)
    scale = np.maximum(1, np.abs(value))
    assert (np.abs(np.array(gelu(x)) - value) / scale).max() < 1e-6
    found = np.array(mx.grad(lambda v: gelu(v).sum())(x))
    assert np.abs(found - derivative).max() < 2e-6
    compiled = np.array(mx.compile(mx.grad(lambda v: (3 * gelu(v)).sum()))(x))
    assert np.abs(compiled - 3 * derivative).max() < 6e-6
    stock = np.array(nn.gelu_approx(x))
    assert (np.abs(np.array(gelu(x)) - stock) / scale).max() < 1e-6


def test_a_model_uses_it_on_the_cpu_and_computes_the_same(random_gpt2):
    import mlx.core as mx
    from mlx_lm.models.gpt2 import MLP

    from mlx_posttrain import engines

    if mx.default_device() == mx.Device(mx.gpu):
        pytest.skip("MLX's own function stays on the GPU")
    model = engines.get("mlx").load(random_gpt2)
    mlps = [m for m in model.net.modules() if isinstance(m, MLP)]
    assert len(mlps) == 2 and all(type(m) is not MLP for m in mlps)
    tokens = np.arange(40)[None]
    fast = model.full_logits(tokens)
    for m in mlps:
        m.__class__ = MLP
    assert np.abs(fast - model.full_logits(tokens)).max() < 1e-5
