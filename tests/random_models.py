"""Folders of Llama-like models of any sizes, with random weights or with a hole in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Sizes by config.json's names: of the published models, and of one that is small.
QWEN_HALF = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
LLAMA_ONE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
LLAMA_EIGHT = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}
SMALL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def random_model(
    folder: Path, sizes: dict[str, Any], dtype: str = "float32", tokenizer: Path | None = None
) -> Path:
    """Write a folder of ``sizes``, whose head is tied unless they say otherwise.

    tokenizer: a folder whose tokenizer files are copied.
    """
    import mlx.core as mx

    config, network = _network(sizes, dtype)
    weights = {}
    for name, value in network.items():
        weights[name] = value
        mx.eval(value)
    _write_config(folder, config, tokenizer)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


def hollow_model(
    folder: Path, sizes: dict[str, Any], bits: int | None = None, tokenizer: Path | None = None
) -> Path:
    """Write a folder in bfloat16 whose weights are a header and a hole, which takes no space on disk.

    bits: of packed weights, as mlx-lm's converter writes them.
    """
    kinds = {"uint32": "U32", "bfloat16": "BF16"}
    config, network = _network(sizes, "bfloat16", bits)
    header, end = {}, 0
    for name, value in network.items():
        begin, end = end, end + value.nbytes
        kind = kinds[str(value.dtype).rpartition(".")[2]]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [begin, end]}
    _write_config(folder, config, tokenizer)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def _network(
    sizes: dict[str, Any], dtype: str, bits: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config and weights by name that are not computed yet."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    config = {
        "architectures": [_CLASSES[sizes["model_type"]]],
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype": dtype,
        **sizes,
    }
    kind, arguments = _get_classes(config)
    mx.random.seed(0)
    network = kind(arguments.from_dict(config))
    network.set_dtype(getattr(mx, dtype))
    if bits:
        nn.quantize(network, 64, bits)
        config["quantization"] = config["quantization_config"] = {"group_size": 64, "bits": bits}
    return config, dict(tree_flatten(network.parameters()))


def _write_config(folder: Path, config: dict[str, Any], tokenizer: Path | None) -> None:
    from mlx_posttrain.convert.files import copy_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
