"""Merged adapters against PEFT's own merge, and how much of an update a quantised base keeps."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.convert.adapters import read_adapter
from mlx_posttrain.convert.merge import delta, fold, merge, quantised_drift
from mlx_posttrain.convert.weights import load_weights
from mlx_posttrain.errors import UserError

LORA = {"r": 1, "lora_alpha": 2}


def test_lora_by_hand():
    """B A scaled by alpha / r = 2, transposed to Conv1D's (in, out)."""
    module = {"lora_a": np.array([[1.0], [2.0]]), "lora_b": np.array([[3.0, 0.0, 1.0]])}
    base = {
        "transformer.h.0.mlp.c_fc.weight": np.ones((2, 3), np.float32),
        "transformer.wte.weight": np.ones((2, 2), np.float32),
    }
    merged = merge(base, {"model.h.0.mlp.c_fc": module}, LORA)
    assert merged["transformer.h.0.mlp.c_fc.weight"].tolist() == [[7, 1, 3], [13, 1, 5]]
    assert merged["transformer.wte.weight"] is base["transformer.wte.weight"]
    assert base["transformer.h.0.mlp.c_fc.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert delta(module, 2.0).shape == (3, 2)


def test_dora_by_hand():
    """The rows (3, 4) and (0, 2) of the sum get the lengths 10 and 1."""
    weight, update = np.array([[1.0, 4.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [0.0, 1.0]])
    assert fold(weight, update, np.array([10.0, 1.0])).tolist() == [[6, 8], [0, 1]]


def test_bare_names_and_other_architectures():
    module = {"lora_a": np.array([[1.0], [0.0]]), "lora_b": np.array([[1.0, 0.0, 0.0]])}
    assert (
        merge({"h.0.mlp.c_fc.weight": np.zeros((2, 3), np.float32)}, {"model.h.0.mlp.c_fc": module}, LORA)[
            "h.0.mlp.c_fc.weight"
        ][0, 0]
        == 2
    )
    base = {"model.layers.0.q_proj.weight": np.zeros((3, 2), np.float32)}
    merged = merge(base, {"model.layers.0.q_proj": module}, LORA, model_type="llama")
    assert merged["model.layers.0.q_proj.weight"].tolist() == [[2, 0], [0, 0], [0, 0]]


def test_an_adapter_for_another_base():
    module = {"lora_a": np.ones((2, 1)), "lora_b": np.ones((1, 3))}
    with pytest.raises(
        UserError,
        match=r"the adapter does not fit this base: the base has no "
        r"transformer.h.5.mlp.c_fc",
    ):
        merge({"transformer.wte.weight": np.ones((2, 2))}, {"model.h.5.mlp.c_fc": module}, LORA)
    with pytest.raises(
        UserError,
        match=r"h.0.mlp.c_fc.weight is \(4, 2\) \(out, in\), its update is \(3, "
        r"2\)",
    ):
        merge({"h.0.mlp.c_fc.weight": np.ones((2, 4))}, {"model.h.0.mlp.c_fc": module}, LORA)


def test_beyond_the_range_of_half_precision():
    module = {"lora_a": np.full((2, 1), 300.0), "lora_b": np.full((1, 3), 300.0)}
    base = {"h.0.mlp.c_fc.weight": np.ones((2, 3), np.float16)}
    with pytest.raises(
        UserError,
        match=r"merging model.h.0.mlp.c_fc leaves the range of float16; convert "
        r"the base to float32 first",
    ):
        merge(base, {"model.h.0.mlp.c_fc": module}, LORA)


@pytest.mark.parametrize("library", ["mlx", "torch"])
def test_sums_are_float32_and_the_type_is_kept(library):
    """1 + 200 times 2^-10 in one product: bf16 sums would drop what float32 keeps until the end."""
    module = {"lora_a": np.full((1, 200), 2.0**-10, np.float32), "lora_b": np.ones((200, 1), np.float32)}
    if library == "mlx":
        mx = pytest.importorskip("mlx.core")
        base = {"h.0.mlp.c_fc.weight": mx.ones((1, 1), mx.bfloat16)}
    else:
        torch = pytest.importorskip("torch")
        base = {"h.0.mlp.c_fc.weight": torch.ones(1, 1, dtype=torch.bfloat16)}
    merged = merge(base, {"model.h.0.mlp.c_fc": module}, {"r": 200, "lora_alpha": 200})["h.0.mlp.c_fc.weight"]
    assert merged.dtype == base["h.0.mlp.c_fc.weight"].dtype
    assert float(merged.item()) == 1.1953125  # 1 + 200 / 1024, rounded once to bf16


@pytest.mark.parametrize(("rslora", "dora"), [(False, False), (True, False), (False, True)])
def test_equals_pefts_own_merge(tmp_path, gpt2_folder, hf_logits, tokens, rslora, dora):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    source = gpt2_folder()
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "c_proj"],
        use_rslora=rslora,
        use_dora=dora,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1.4)
    expected = hf_logits(model, tokens)
    model.save_pretrained(tmp_path / "peft")
    config, modules = read_adapter(tmp_path / "peft")
    merged = merge(load_weights(source), modules, config)
    theirs = model.merge_and_unload().state_dict()
    assert all(np.abs(np.array(value) - theirs[name].numpy()).max() < 1e-6 for name, value in merged.items())
    ours = AutoModelForCausalLM.from_pretrained(source)
    ours.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in merged.items()}, strict=False
    )
    assert np.abs(hf_logits(ours, tokens) - expected).max() < 1e-4


def test_a_small_update_is_lost_in_a_4_bit_base():
    """Updates of 3, 8 and 28 % of the weights' size keep a cosine of about .1, .6 and .95 in 4 bits.

    8 bits keep nearly all.
    """
    mx = pytest.importorskip("mlx.core")
    generator = np.random.default_rng(0)
    raw = mx.array(generator.normal(0, 0.02, (256, 256)).astype(np.float32))
    direction = generator.normal(size=(256, 8)) @ generator.normal(size=(8, 256))

    def drift(ratio, bits):
        weight = np.array(
            mx.dequantize(*mx.quantize(raw, group_size=64, bits=bits), group_size=64, bits=bits)
        )
        update = (direction / np.linalg.norm(direction) * np.linalg.norm(weight) * ratio).astype(np.float32)
        result = quantised_drift(weight, update, bits)
        assert result["update_ratio"] == pytest.approx(ratio, rel=1e-3)
        return result

    cosines = [drift(ratio, 4)["cosine"] for ratio in (0.03, 0.08, 0.28)]
    assert cosines[0] < 0.3 and cosines[0] < cosines[1] < 0.85 and cosines[2] > 0.9
    assert drift(0.28, 8)["cosine"] > 0.99 and drift(0.28, 8)["norm_ratio"] == pytest.approx(1, abs=0.02)
    assert drift(0.28, 8)["error"] < 0.1 < drift(0.03, 4)["error"]
    assert quantised_drift(np.ones((2, 64)), np.zeros((2, 64)), 4) == {
        "cosine": 1.0,
        "norm_ratio": 0.0,
        "error": 0.0,
        "update_ratio": 0.0,
    }
