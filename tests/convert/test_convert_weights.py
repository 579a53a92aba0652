"""Model folders: files, shards, GPT-2 in both directions, quantisation, other architectures, refusals.

GPT-2 is compared with transformers and mlx-lm.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain.convert import files
from mlx_posttrain.convert.weights import convert, gpt2_config, load_weights, save_weights
from mlx_posttrain.errors import UserError

mx = pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

GPT2_TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizer" / "gpt2"


def torch_tensors(folder):
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["transformer", "bare", "buffers", "lm_head"])
def test_round_trip_is_bit_for_bit(tmp_path, gpt2_folder, layout, dtype):
    source = gpt2_folder(layout=layout, dtype=dtype)
    done = convert(source, tmp_path / "mlx", to="mlx")
    assert done.tensors == 2 + 2 * 12 + 2 and done.bits is None and done.model_type == "gpt2"
    convert(tmp_path / "mlx", tmp_path / "back", to="hf")
    original = {
        k.removeprefix("transformer."): v
        for k, v in torch_tensors(source).items()
        if not k.endswith((".attn.bias", "masked_bias"))
    }
    original.pop("lm_head.weight", None)
    back = torch_tensors(tmp_path / "back")
    assert set(back) == {f"transformer.{name}" for name in original}
    for name, value in original.items():
        other = back[f"transformer.{name}"]
        assert other.dtype == value.dtype == getattr(torch, dtype) and torch.equal(other, value)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("layout", ["transformer", "bare", "buffers", "lm_head"])
def test_mlx_lm_loads_it_and_agrees_with_transformers(
    tmp_path, gpt2_folder, hf_logits, mlx_logits, tokens, layout
):
    import mlx_lm
    from transformers import AutoModelForCausalLM

    source = gpt2_folder(layout=layout)
    convert(source, tmp_path / "mlx")
    model, tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    assert np.abs(expected).max() > 0.5
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4
    assert tokenizer.decode(tokenizer.encode("the lazy dog")) == "the lazy dog"


def test_transformers_loads_the_way_back_without_a_warning(tmp_path, gpt2_folder, quiet, hf_logits, tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gpt2_folder(layout="buffers")
    convert(source, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "back", to="hf")
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "GPT2LMHeadModel" and tokenizer.eos_token_id == 0
    assert np.array_equal(
        hf_logits(model, tokens), hf_logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    )
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["dtype"] == "float32"
    assert "torch_dtype" not in config and "quantization" not in config
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 0


def test_generation_config_is_made_when_the_source_has_none(tmp_path, gpt2_folder, quiet):
    from transformers import AutoModelForCausalLM

    source = gpt2_folder()
    (source / "generation_config.json").unlink()
    convert(source, tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with quiet():
        AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_sharded_source_and_sharded_result(tmp_path, gpt2_folder, hf_logits, mlx_logits, tokens):
    import mlx_lm
    from transformers import AutoModelForCausalLM

    source = gpt2_folder(shard="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    done = convert(source, tmp_path / "mlx", max_shard_bytes=150_000)
    assert len(list((tmp_path / "mlx").glob("model-*.safetensors"))) > 2 and done.tensors == 28
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4
    convert(tmp_path / "mlx", tmp_path / "back", to="hf", max_shard_bytes=150_000)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert np.array_equal(hf_logits(back, tokens), expected)


def test_missing_and_damaged_shards(tmp_path, gpt2_folder):
    source = gpt2_folder(shard="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        UserError,
        match=rf"{shard.name} is damaged or is not a safetensors file .*; "
        r"download or copy it again",
    ):
        convert(source, tmp_path / "mlx")
    shard.unlink()
    with pytest.raises(
        UserError,
        match=rf"lacks the shard {shard.name} that model.safetensors.index.json names; download "
        r"or copy the model",
    ):
        convert(source, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists() and not list(tmp_path.glob(".mlx*"))


@pytest.mark.parametrize("kind", ["mlx", "torch", "numpy"])
def test_save_weights_of_every_library(tmp_path, kind):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    make = {"mlx": lambda v: mx.array(v), "torch": lambda v: torch.from_numpy(v), "numpy": lambda v: v}[kind]
    assert save_weights(tmp_path, {"a": make(value), "b": make(value + 1)}) == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"} and np.array_equal(file.get_tensor("b"), value + 1)
    assert np.array_equal(np.array(load_weights(tmp_path)["a"]), value)


def test_saving_again_leaves_no_weight_file_of_the_earlier_model(tmp_path):
    weights = {name: mx.zeros((8, 8)) for name in "abc"}
    assert len(save_weights(tmp_path, weights, max_shard_bytes=300)) == 3
    assert save_weights(tmp_path, {"a": mx.ones((2,))}) == ["model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    assert len(save_weights(tmp_path, weights, max_shard_bytes=300)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]


def test_a_failed_save_keeps_the_earlier_file(tmp_path, monkeypatch):
    save_weights(tmp_path, {"a": mx.ones((2,))})
    monkeypatch.setattr(
        mx, "save_safetensors", lambda path, *_, **__: (Path(path).write_bytes(b"half"), 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        save_weights(tmp_path, {"a": mx.zeros((2,))})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_weights(tmp_path)["a"].tolist() == [1, 1]


def test_disk_space_is_checked_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    save_weights(tmp_path / "fits", {"a": mx.zeros((1000,))})
    with pytest.raises(
        UserError,
        match=r"not enough disk space in .*: 4.0 MB needed, 2.0 MB free; free "
        r"some or choose another folder",
    ):
        save_weights(tmp_path / "too" / "large", {"a": mx.zeros((1_000_000,))})
    assert not (tmp_path / "too").exists()


def test_output_in_use_and_force(tmp_path, gpt2_folder):
    source, target = gpt2_folder(), tmp_path / "out"
    target.mkdir()
    convert(source, target)  # empty is fine
    with pytest.raises(UserError, match=r"out exists and is not empty; choose another folder or use --force"):
        convert(source, target)
    (target / "notes.txt").write_text("mine")
    (target / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    convert(gpt2_folder("other", seed=1), target, to="hf", force=True)
    assert (target / "notes.txt").read_text() == "mine" and not list(target.glob("model-*"))
    assert "transformer.wte.weight" in torch_tensors(target)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file; give a folder to write to"):
        convert(source, tmp_path / "file")


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.8)])
def test_quantised_folder(tmp_path, gpt2_folder, hf_logits, mlx_logits, tokens, bits, tolerance, capsys):
    import mlx_lm
    from transformers import AutoModelForCausalLM

    source = gpt2_folder()
    done = convert(source, tmp_path / "q", quantize=bits)
    assert done.bits == bits and capsys.readouterr().out == ""
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    assert (
        type(model.model.h[0].attn.c_attn).__name__ == "QuantizedLinear"
        and model.model.h[0].attn.c_attn.bits == bits
    )
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    got = mlx_logits(model, tokens)
    assert 1e-4 < np.abs(got - expected).max() < tolerance
    with pytest.raises(
        UserError,
        match=r"q is quantised; give a dtype \(float16, bfloat16 or float32\) to "
        r"dequantise it",
    ):
        convert(tmp_path / "q", tmp_path / "back", to="hf")
    convert(tmp_path / "q", tmp_path / "back", to="hf", dtype="float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert np.abs(hf_logits(back, tokens) - got).max() < 1e-3


def test_quantise_needs_a_fitting_width(tmp_path, gpt2_folder):
    source = gpt2_folder(n_embd=48, n_head=4)
    with pytest.raises(UserError, match=r"n_embd 48 is not a multiple of the group size 32"):
        convert(source, tmp_path / "q", quantize=4)
    convert(gpt2_folder("w96", n_embd=96), tmp_path / "q", quantize=4)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]["group_size"] == 32


def test_dtype(tmp_path, gpt2_folder):
    source = gpt2_folder()
    for dtype in ("float16", "bfloat16"):
        convert(source, tmp_path / dtype, to="hf", dtype=dtype)
        got, original = torch_tensors(tmp_path / dtype), torch_tensors(source)
        assert all(torch.equal(v, original[k].to(getattr(torch, dtype))) for k, v in got.items())
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    weights = torch_tensors(source)
    weights["transformer.ln_f.weight"][0] = 1e6
    save_weights(source, weights)
    with pytest.raises(
        UserError,
        match=r"model.ln_f.weight holds values beyond float16's range \(65504\); "
        r"choose bfloat16 or float32",
    ):
        convert(source, tmp_path / "over", dtype="float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "cannot convert to 'gguf'; choose mlx or hf"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose one of float32, float16, bfloat16"),
        ({"quantize": 7}, "cannot quantise to 7 bits; choose one of 2, 3, 4, 5, 6, 8"),
        ({"quantize": 4, "to": "hf"}, "quantised weights are MLX's own; use quantize with to mlx only"),
        ({"quantize": 4, "group_size": 48}, "unknown group size 48; choose 32, 64 or 128"),
    ],
)
def test_unusable_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        convert(tmp_path, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"activation_function": "relu"},
            "activation_function 'relu', which mlx-lm's GPT-2 does not compute; supported: 'gelu_new'",
        ),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"scale_attn_weights": False}, "scale_attn_weights False"),
        ({"n_inner": 100}, r"n_inner 100; mlx-lm's GPT-2 has 4 \* n_embd = 256 only"),
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            "GPT2ForSequenceClassification; only GPT-2 language models",
        ),
        ({"n_layer": 3}, r"the weights lack model.h.2.ln_1.weight \(and 11 more\)"),
    ],
)
def test_gpt2_variants_that_would_be_computed_wrongly(tmp_path, gpt2_folder, changes, message):
    source = gpt2_folder()
    edit_config(source, **changes)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out")


def test_untied_head_is_refused_but_an_equal_copy_is_not(tmp_path, gpt2_folder):
    source = gpt2_folder(layout="lm_head")
    edit_config(source, tie_word_embeddings=False)
    convert(source, tmp_path / "equal")
    assert json.loads((tmp_path / "equal" / "config.json").read_text())["tie_word_embeddings"] is True
    weights = torch_tensors(source)
    weights["lm_head.weight"] += 1
    save_weights(source, weights)
    with pytest.raises(UserError, match=r"output head of its own"):
        convert(source, tmp_path / "out")


def test_config_is_completed_for_mlx_lm():
    full = gpt2_config({"model_type": "gpt2", "n_positions": 64})
    assert (
        full["n_ctx"] == 64
        and full["n_embd"] == 768
        and full["n_layer"] == 12
        and full["layer_norm_epsilon"] == 1e-5
    )
    assert gpt2_config({"model_type": "gpt2", "n_ctx": 32, "n_positions": 64})["n_ctx"] == 32


@pytest.fixture
def llama_folder(tmp_path, write_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "llama"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, "PreTrainedTokenizerFast")
    return folder


def test_other_architectures_pass_through_mlx_lm(
    tmp_path, llama_folder, hf_logits, mlx_logits, tokens, capsys
):
    import mlx_lm
    from transformers import AutoModelForCausalLM

    done = convert(llama_folder, tmp_path / "mlx")
    assert done.model_type == "llama" and done.path == tmp_path / "mlx" and capsys.readouterr().out == ""
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(llama_folder), tokens)
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4
    assert (tmp_path / "mlx" / "tokenizer.json").read_bytes() == (
        llama_folder / "tokenizer.json"
    ).read_bytes()
    convert(llama_folder, tmp_path / "q", quantize=8)
    assert "quantization" in json.loads((tmp_path / "q" / "config.json").read_text())
    with pytest.raises(UserError, match=r"is llama; only GPT-2 converts to Hugging Face's format"):
        convert(tmp_path / "mlx", tmp_path / "back", to="hf")


def test_an_architecture_mlx_lm_does_not_have(tmp_path, llama_folder):
    edit_config(llama_folder, model_type="abacus")
    with pytest.raises(UserError, match=r"llama: transformers .* cannot read its config.json .*`?abacus"):
        convert(llama_folder, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path, gpt2_folder):
    source = gpt2_folder()
    for name in ("merges.txt", "vocab.json", "special_tokens_map.json", "chat_template.jinja"):
        (source / name).write_text("{}  odd   bytes\r\n")
    (source / "secret.py").write_text("")
    convert(source, tmp_path / "mlx")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "vocab.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "mlx" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "mlx" / "secret.py").exists()


@pytest.mark.parametrize(
    ("written", "splitter", "expected"),
    [
        ("TokenizersBackend", {}, "GPT2Tokenizer"),
        ("TokenizersBackend", {"type": "Whitespace"}, "PreTrainedTokenizerFast"),
        ("TokenizersBackend", {"use_regex": False}, "PreTrainedTokenizerFast"),
        ("GPT2TokenizerFast", {}, "GPT2TokenizerFast"),
        ("GPT2Tokenizer", {}, "GPT2Tokenizer"),
        ("Qwen2Tokenizer", {}, "Qwen2Tokenizer"),
    ],
)
def test_tokenizer_class_that_only_transformers_5_knows(
    tmp_path, gpt2_folder, write_tokenizer, written, splitter, expected
):
    source = gpt2_folder()
    write_tokenizer(source, written)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] |= splitter
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(source, tmp_path / "mlx")
    before, after = (p / "tokenizer_config.json" for p in (source, tmp_path / "mlx"))
    assert after.read_text() == before.read_text().replace(f'"{written}"', f'"{expected}"')


def test_a_list_of_extra_special_tokens_gets_the_name_both_versions_read(tmp_path, gpt2_folder):
    from transformers import AutoTokenizer

    source = gpt2_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(source)
    before = (source / "tokenizer_config.json").read_text()
    assert '"extra_special_tokens": [' in before
    convert(source, tmp_path / "mlx")
    after = (tmp_path / "mlx" / "tokenizer_config.json").read_text()
    assert after == before.replace("extra_special_tokens", "additional_special_tokens")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "mlx")
    assert "<think>" in loaded.all_special_tokens and loaded.encode("<think>") == tokenizer.encode("<think>")


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="the real GPT-2 tokenizer is not here")
def test_the_real_tokenizer_gives_the_same_ids_everywhere(tmp_path, gpt2_folder, quiet):
    import mlx_lm
    from transformers import AutoTokenizer

    source = gpt2_folder(vocab_size=50257, n_embd=32, n_layer=1)
    for file in GPT2_TOKENIZER.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, source / file.name)
    # transformers 5 writes this if it does not know the model's own class.
    text = (source / "tokenizer_config.json").read_text().replace("GPT2TokenizerFast", "TokenizersBackend")
    (source / "tokenizer_config.json").write_text(text)
    convert(source, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "back", to="hf")
    _, mlx_tokenizer = mlx_lm.load(str(tmp_path / "mlx"))
    with quiet():
        back = AutoTokenizer.from_pretrained(tmp_path / "back")
    original = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    for text in ("Hello, world!", " café\n\n2 + 2 = 4<|endoftext|>", "  two  spaces"):
        assert original.encode(text) == back.encode(text) == mlx_tokenizer.encode(text)


@pytest.mark.slow
def test_parity_and_round_trip_at_124m(tmp_path, gpt2_folder, hf_logits, mlx_logits):
    import mlx_lm
    from transformers import AutoModelForCausalLM

    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    source = gpt2_folder(layout="buffers", **sizes)
    tokens = np.random.default_rng(0).integers(0, 50257, (1, 12)).tolist()
    convert(source, tmp_path / "mlx", max_shard_bytes=200_000_000)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(source), tokens)
    assert np.abs(mlx_logits(model, tokens) - expected).max() < 1e-4
    convert(tmp_path / "mlx", tmp_path / "back", to="hf")
    original, back = torch_tensors(source), torch_tensors(tmp_path / "back")
    assert all(
        torch.equal(value, original[name.removeprefix("transformer.")]) for name, value in back.items()
    )
    assert sum(v.numel() for v in back.values()) == 124_439_808
