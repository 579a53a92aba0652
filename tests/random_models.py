"""Folders of Llama-like models with random weights, of any sizes and number format, made with MLX."""

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
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from mlx_posttrain.convert.files import copy_tokenizer

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
    network, arguments = _get_classes(config)
    mx.random.seed(0)
    weights = {}
    for name, value in tree_flatten(network(arguments.from_dict(config)).parameters()):
        weights[name] = value.astype(getattr(mx, dtype))
        mx.eval(weights[name])
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return folder
