"""Names and layouts of GPT-2's tensors, on arrays of all three libraries."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.convert import gpt2
from mlx_posttrain.errors import UserError

D, VOCAB, CONTEXT = 4, 6, 8


def bare_weights(n_layer=2, seed=0):
    """Return GPT-2's tensors under the names of the hub's files, with Conv1D matrices (in, out)."""
    generator = np.random.default_rng(seed)
    shapes = {"wte.weight": (VOCAB, D), "wpe.weight": (CONTEXT, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(n_layer):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (D,), f"h.{i}.{norm}.bias": (D,)}
        for name, (a, b) in {
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "mlp.c_fc": (D, 4 * D),
            "mlp.c_proj": (4 * D, D),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": (a, b), f"h.{i}.{name}.bias": (b,)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def prefixed(weights):
    return {f"transformer.{name}": value for name, value in weights.items()}


def to_library(value, kind):
    if kind == "mlx":
        return pytest.importorskip("mlx.core").array(value)
    if kind == "torch":
        return pytest.importorskip("torch").from_numpy(value)
    return value


@pytest.mark.parametrize("kind", ["numpy", "mlx", "torch"])
@pytest.mark.parametrize("rename", [dict, prefixed])
def test_round_trip_keeps_every_tensor(kind, rename):
    original = bare_weights()
    given = {name: to_library(value, kind) for name, value in rename(original).items()}
    converted = gpt2.hf_to_mlx(given, 2)
    assert set(converted) == set(gpt2.expected_names(2))
    back = gpt2.mlx_to_hf(converted)
    assert set(back) == set(prefixed(original))
    for name, value in prefixed(original).items():
        assert np.array_equal(np.asarray(back[name].tolist(), np.float32), value)
        assert type(back[name]) is type(given[next(iter(given))])


def test_matrices_become_out_in_and_nothing_else_is_transposed():
    original = bare_weights()
    converted = gpt2.hf_to_mlx(original, 2)
    # attn.c_proj is square: its shape does not show the transposition
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert np.array_equal(converted[f"model.h.1.{name}.weight"], original[f"h.1.{name}.weight"].T)
    assert np.array_equal(converted["model.wte.weight"], original["wte.weight"])
    assert np.array_equal(converted["model.wpe.weight"], original["wpe.weight"])
    assert converted["model.h.1.mlp.c_fc.weight"].flags["C_CONTIGUOUS"]


def test_mlx_names_pass_through_unchanged():
    converted = gpt2.hf_to_mlx(bare_weights(), 2)
    again = gpt2.hf_to_mlx(converted, 2)
    assert all(again[name] is value for name, value in converted.items())


def test_buffers_and_head_copy_are_dropped():
    weights = prefixed(bare_weights())
    weights["transformer.h.0.attn.bias"] = np.ones((1, 1, CONTEXT, CONTEXT), np.float32)
    weights["transformer.h.0.attn.masked_bias"] = np.float32(-1e4)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].copy()
    converted = gpt2.hf_to_mlx(weights, 2)
    assert set(converted) == set(gpt2.expected_names(2))
    assert converted["model.h.0.attn.c_attn.bias"].shape == (3 * D,)  # only attn.bias is a buffer


def test_a_shared_tensor_stored_under_the_heads_name_only():
    weights = bare_weights()
    weights["lm_head.weight"] = weights.pop("wte.weight")
    assert gpt2.hf_to_mlx(weights, 2)["model.wte.weight"] is weights["lm_head.weight"]


def test_an_untied_head():
    weights = bare_weights()
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    with pytest.raises(
        UserError,
        match=r"lm_head.weight differs from wte.weight in a tied model; if that is meant, set "
        r"tie_word_embeddings",
    ):
        gpt2.hf_to_mlx(weights, 2)
    converted = gpt2.hf_to_mlx(weights, 2, tie_word_embeddings=False)
    assert converted["lm_head.weight"] is weights["lm_head.weight"]
    assert gpt2.mlx_to_hf(converted)["lm_head.weight"] is weights["lm_head.weight"]


def test_score_head_passes_through():
    weights = bare_weights() | {"score.weight": np.ones((1, D), np.float32)}
    converted = gpt2.hf_to_mlx(weights, 2)
    assert gpt2.mlx_to_hf(converted)["score.weight"] is weights["score.weight"]


def test_missing_and_foreign_tensors_are_named():
    weights = bare_weights()
    del weights["h.1.mlp.c_fc.bias"], weights["ln_f.bias"]
    with pytest.raises(
        UserError,
        match=r"the weights lack model.h.1.mlp.c_fc.bias \(and 1 more\) for a "
        r"GPT-2 with n_layer 2",
    ):
        gpt2.hf_to_mlx(weights, 2)
    with pytest.raises(
        UserError,
        match=r"model.h.2.attn.c_attn.bias \(and 11 more\) is not part of a GPT-2 "
        r"with n_layer 2",
    ):
        gpt2.hf_to_mlx(bare_weights(3), 2)
    with pytest.raises(UserError, match=r"model.adapter is not part"):
        gpt2.hf_to_mlx(bare_weights() | {"adapter": np.ones(1)}, 2)


def test_quantised_names_are_accepted_but_not_converted_back():
    converted = gpt2.hf_to_mlx(bare_weights(), 2)
    converted["model.h.0.mlp.c_fc.scales"] = np.ones((4 * D, 1), np.float32)
    assert gpt2.hf_to_mlx(converted, 2).keys() == converted.keys()
    with pytest.raises(UserError, match=r"these weights are quantised; give a dtype"):
        gpt2.mlx_to_hf(converted)


def test_is_conv1d():
    assert (
        gpt2.is_conv1d("transformer.h.3.attn.c_proj")
        and gpt2.is_conv1d("model.h.0.mlp.c_fc")
        and gpt2.is_conv1d("h.0.attn.c_attn")
    )
    assert not gpt2.is_conv1d("transformer.wte") and not gpt2.is_conv1d("model.layers.0.attn.c_proj")
