"""The faster attention against mlx-lm's own: values, gradients, and where it must not be used."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.gpt2 import Attention  # noqa: E402

from mlx_posttrain import engines  # noqa: E402
from mlx_posttrain.engines.mlx.cpu import attention as mlx_attention  # noqa: E402
from mlx_posttrain.engines.mlx.cpu import exp as mlx_exp  # noqa: E402
from mlx_posttrain.models.merge import base_folder  # noqa: E402


def stock(qkv, heads):
    parts = [p.reshape(*p.shape[:2], heads, -1).transpose(0, 2, 1, 3) for p in mx.split(qkv, 3, axis=-1)]
    out = mx.fast.scaled_dot_product_attention(*parts, scale=parts[0].shape[-1] ** -0.5, mask="causal")
    return out.transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], -1)


@pytest.mark.parametrize(
    ("rows", "length", "heads", "size"), [(1, 1, 1, 4), (2, 7, 3, 8), (3, 64, 2, 16), (1, 300, 4, 8)]
)
# With a scale of 12 scores are in the hundreds, and those of later positions can be a row's largest.
@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(rows, length, heads, size, scale, compiled):
    rng = np.random.default_rng(length)
    qkv = mx.array((scale * rng.standard_normal((rows, length, 3 * heads * size))).astype(np.float32))
    g = mx.array(rng.standard_normal((rows, length, heads * size)).astype(np.float32))

    def run(function):
        return lambda x, g: [*mx.vjp(function, [x], [g])[0], *mx.vjp(function, [x], [g])[1]]

    wrap = mx.compile if compiled else (lambda f: f)
    found, true = (
        wrap(run(f))(qkv, g) for f in (lambda x: mlx_attention.causal(x, heads), lambda x: stock(x, heads))
    )
    for a, b in zip(found, true, strict=True):
        np.testing.assert_allclose(
            np.array(a), np.array(b), atol=2e-5 * scale * (1 if scale == 1 else 20), rtol=1e-4
        )


def test_nothing_looks_ahead():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 9, 24)).astype(np.float32)
    changed = x.copy()
    changed[:, 5:] = 1e3
    a, b = (np.array(mlx_attention.causal(mx.array(v), 2)) for v in (x, changed))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    gradient = mx.grad(lambda v: mlx_attention.causal(v, 2)[:, :5].sum())(mx.array(x))
    assert np.array(gradient)[:, 5:].any() == np.False_


@pytest.mark.skipif(not mlx_exp.is_scalar(), reason="mlx-lm's own stays here")
def test_a_model_uses_it_only_where_it_computes_the_same(monkeypatch):
    model = engines.get("mlx").load(base_folder("tiny"))
    layers = [m for m in model.net.modules() if isinstance(m, Attention)]
    assert len(layers) == 6 and all(type(m) is mlx_attention.CausalAttention for m in layers)
    tokens = np.random.default_rng(0).integers(1, 4000, (3, 40))
    calls = []
    ours = mlx_attention.causal
    monkeypatch.setattr(
        mlx_attention, "causal", lambda qkv, heads: (calls.append(heads), ours(qkv, heads))[1]
    )
    fast = model.full_logits(tokens)
    assert calls == [6] * 6
    model.generate([[5, 6, 7], [8]], max_tokens=3, stop=None, temperature=0.0)
    assert len(calls) == 6  # decoding has a cache and padding on the left
    for m in layers:
        m.__class__ = Attention
    np.testing.assert_allclose(fast, model.full_logits(tokens), atol=2e-5)
    other = engines.get("mlx").load(base_folder("tiny"), dtype="bfloat16")
    assert not any(isinstance(m, mlx_attention.CausalAttention) for m in other.net.modules())


@pytest.mark.parametrize("case", ["causal", "cached", "unmasked", "padded", "scaled"])
def test_a_layer_computes_what_mlx_lms_own_does(case):
    """In training there is no cache and only later positions are masked; all else is left to mlx-lm."""
    from mlx_lm.models.cache import KVCache
    from mlx_lm.models.gpt2 import ModelArgs

    args = ModelArgs(
        model_type="gpt2",
        n_ctx=32,
        n_embd=12,
        n_head=3,
        n_layer=1,
        n_positions=32,
        layer_norm_epsilon=1e-5,
        vocab_size=8,
    )
    layer = Attention(args)
    if case == "scaled":
        layer.scale = 0.3
    x = mx.random.normal((2, 6, 12), key=mx.random.key(0))
    padded = mx.tril(mx.ones((6, 6), dtype=mx.bool_)) & (mx.arange(6) > 1) | mx.eye(6, dtype=mx.bool_)
    mask = {"unmasked": None, "padded": padded}.get(case, "causal")
    found = []
    for kind in (Attention, mlx_attention.CausalAttention):
        layer.__class__ = kind
        cache = KVCache() if case == "cached" else None
        found.append(np.array(layer(x, mask, cache)))
        if cache is not None:
            # One more token reads the cache.
            found[-1] = np.concatenate([found[-1], np.array(layer(x[:, :1], None, cache))], axis=1)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert mlx_attention.applies(layer, mask, cache) == (case == "causal")
