"""Names of layers and tensors in Hugging Face's files and in the MLX engine's networks.

Most architectures of mlx-lm have transformers' names. GPT-2's and GPT-NeoX's differ, and a GPT-NeoX's head
stands beside its blocks here (engines/mlx/load.py) and among them in mlx-lm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import gpt2

Weights = dict[str, Any]

# The first that fits counts.
_TO_HF = {
    "gpt2": (("model.h.", "transformer.h."), ("model.wte", "transformer.wte")),
    "gpt_neox": (
        ("model.h.", "gpt_neox.layers."),
        ("model.embed_out.", "embed_out."),
        ("lm_head.", "embed_out."),
        ("model.", "gpt_neox."),
    ),
}
_TO_MLX = {
    "gpt2": (("transformer.h.", "model.h."), ("h.", "model.h.")),
    "gpt_neox": (
        ("gpt_neox.layers.", "model.h."),
        ("gpt_neox.", "model."),
        ("embed_out.", "lm_head."),
        ("model.embed_out.", "lm_head."),
    ),
}
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def hf_path(module: str, model_type: str = "gpt2") -> str:
    """Return the transformers path of a module of the MLX engine.

    GPT-2's `model.h.0.attn.c_attn` becomes `transformer.h.0.attn.c_attn`; a path that has transformers' name
    already is returned unchanged.
    """
    return _renamed(module, _TO_HF.get(model_type, ()))


def mlx_path(module: str, model_type: str = "gpt2") -> str:
    """Return the MLX engine's path of a transformers module, with or without GPT-2's `transformer.`."""
    return _renamed(module, _TO_MLX.get(model_type, ()))


def to_hf(weights: Mapping[str, Any], model_type: str) -> Weights:
    """Return the MLX engine's weights under Hugging Face's names, a GPT-2's matrices (in, out)."""
    if model_type == "gpt2":
        return gpt2.mlx_to_hf(weights)
    return {hf_path(name, model_type): value for name, value in weights.items()}


def to_mlx(weights: Mapping[str, Any], config: Mapping[str, Any]) -> Weights:
    """Return a folder's weights under the MLX engine's names. Raises UserError as `gpt2.hf_to_mlx`.

    `config` is the folder's config.json.
    """
    if config["model_type"] == "gpt2":
        return gpt2.hf_to_mlx(weights, config["n_layer"], config.get("tie_word_embeddings", True))
    if config["model_type"] != "gpt_neox":
        return dict(weights)
    renamed = {mlx_path(name, "gpt_neox"): value for name, value in weights.items()}
    if config.get("tie_word_embeddings"):
        renamed.pop("lm_head.weight", None)
    return {name: value for name, value in renamed.items() if not name.endswith(_BUFFERS)}


def hf_weights(weights: Mapping[str, Any], config: Mapping[str, Any]) -> Weights:
    """Return a folder's weights under Hugging Face's names, whichever of the two it has."""
    if config["model_type"] == "gpt2":
        return to_hf(to_mlx(weights, config), "gpt2")
    return to_hf(weights, config["model_type"])


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
