"""The fast exponentials against float64 and against mlx's own."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")


@pytest.fixture(autouse=True)
def on_linux(monkeypatch):
    """Test wherever there is a CPU backend, also where MLX's own functions would be used."""
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("MLX's own functions stay on the GPU")
    monkeypatch.setattr("mlx_posttrain.engines.mlx.cpu.exp.sys.platform", "linux")


def test_exp_of_all_sizes():
    import mlx.core as mx

    from mlx_posttrain.engines.mlx.cpu import exp as mlx_exp

    x = np.concatenate([-np.logspace(-30, np.log10(87), 200_000), -np.linspace(0, 87, 100_001)]).astype(
        np.float32
    )
    found = np.array(mlx_exp.exp_below(mx.array(x), mx.array([0.0])))
    assert (np.abs(found / np.exp(x.astype(np.float64)) - 1) < 2e-7 + 1.2e-7 * np.abs(x)).all()
    low = np.array(mlx_exp.exp_below(mx.array([-88.0, -1e9, -np.inf, np.nan], mx.float32), mx.array([0.0])))
    assert (low[:3] < 2e-38).all() and (low[:3] >= 0).all() and np.isnan(low[3])


@pytest.mark.parametrize("name", ["softmax", "logsumexp"])
def test_value_and_gradient_are_those_of_mlx(name):
    import mlx.core as mx

    from mlx_posttrain.engines.mlx.cpu import exp as mlx_exp

    rng = np.random.default_rng(0)
    z = mx.array(rng.normal(0, 8, (3, 7, 501)).astype(np.float32))
    z[0, 0, :3] = -1e4
    weight = mx.array(rng.normal(size=z.shape if name == "softmax" else z.shape[:-1]).astype(np.float32))
    ours, stock = getattr(mlx_exp, name), getattr(mx, name)
    assert mx.abs(ours(z) - stock(z, axis=-1)).max().item() < 2e-6
    mine, theirs = (
        mx.grad(lambda z, f=f: (f(z) * weight).sum())(z) for f in (ours, lambda z: stock(z, axis=-1))
    )
    assert mx.abs(mine - theirs).max().item() < 2e-6
    again = mx.compile(mx.grad(lambda z: (ours(z) * weight).sum()))(z)
    assert mx.abs(again - mine).max().item() < 1e-6


def test_nothing_else_is_touched():
    import mlx.core as mx

    from mlx_posttrain.engines.mlx.cpu import exp as mlx_exp

    z = mx.array(np.random.default_rng(0).normal(0, 3, (5, 6)).astype(np.float32))
    for other in (z.astype(mx.bfloat16), z.astype(mx.float16)):
        assert (
            mx.array_equal(mlx_exp.softmax(other), mx.softmax(other, axis=-1))
            and mlx_exp.softmax(other).dtype == other.dtype
        )
    assert mx.array_equal(mlx_exp.softmax(z, axis=0), mx.softmax(z, axis=0))
    assert mx.array_equal(mlx_exp.logsumexp(z, axis=0), mx.logsumexp(z, axis=0))
    assert mx.allclose(mlx_exp.logsumexp(z, keepdims=True), mx.logsumexp(z, axis=-1, keepdims=True))
    infinite = mx.array([[1.0, float("inf")], [1.0, float("nan")]])
    assert not np.isfinite(np.array(mlx_exp.logsumexp(infinite))).any()
