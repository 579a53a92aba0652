"""GPT-2's tensor names and layouts in Hugging Face and mlx-lm.

Hugging Face has `transformer.h.*` with Conv1D weights (in, out), mlx-lm `model.h.*` with weights (out, in).
Pure functions over dictionaries of NumPy, MLX or torch arrays; nothing is computed, so every tensor keeps its
bits and its type. Sources: `transformers/models/gpt2/modeling_gpt2.py` (Conv1D), `mlx_lm/models/gpt2.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlx_posttrain.errors import UserError

Weights = dict[str, Any]

# GPT2Config's defaults for keys that config.json leaves out; mlx-lm has none.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
}
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")

# The four weight matrices of a block that are Conv1D in Hugging Face.
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")

_BUFFER = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")
_CONV1D_WEIGHT = re.compile(r"(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_QUANTISED = (".scales", ".biases")


def is_conv1d(module: str) -> bool:
    """Return whether a GPT-2 module path, with any prefix, is a Conv1D with weight (in, out)."""
    return _CONV1D_WEIGHT.search(f"{module}.weight") is not None


def is_mlx(weights: Mapping[str, Any]) -> bool:
    """Return whether a dictionary has mlx-lm's names (`model.wte.weight`, `model.h.*`)."""
    return any(name.startswith("model.") for name in weights)


def hf_to_mlx(weights: Mapping[str, Any], n_layer: int, tie_word_embeddings: bool = True) -> Weights:
    """Return GPT-2 weights under mlx-lm's names, with matrices (out, in).

    Accepts the hub's bare names (`h.0.*`) and `save_pretrained`'s (`transformer.h.0.*`); a dictionary that
    has mlx-lm's names already is only checked. Drops the `attn.bias` and `attn.masked_bias` buffers, and in a
    tied model a `lm_head.weight` (vocab, d) that equals `wte.weight`. A model that is not tied keeps its
    head. `score.weight` of a reward model passes through.

    Raises:
        UserError: a tensor is missing or is not GPT-2's, or `lm_head.weight` differs from `wte.weight` in a
            tied model.
    """
    if is_mlx(weights):
        out = dict(weights)
    else:
        out = {}
        for name, value in weights.items():
            if _BUFFER.search(name):
                continue
            if _CONV1D_WEIGHT.search(name):
                value = transposed(value)
            out[_mlx_name(name)] = value
    _tie(out, tie_word_embeddings)
    _check_names(out, n_layer)
    return out


def mlx_to_hf(weights: Mapping[str, Any]) -> Weights:
    """Return mlx-lm's GPT-2 weights under transformers' names (`transformer.*`).

    Conv1D matrices become (in, out); a tied model has no head, another keeps its own.

    Raises:
        UserError: the weights are quantised, which Hugging Face's layout does not support.
    """
    if any(name.endswith(_QUANTISED) for name in weights):
        raise UserError(
            "these weights are quantised; give a dtype (float16, bfloat16 or float32) to "
            "dequantise them first"
        )
    out = {}
    for name, value in weights.items():
        if _CONV1D_WEIGHT.search(name):
            value = transposed(value)
        out["transformer." + name.removeprefix("model.") if name.startswith("model.") else name] = value
    return out


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a GPT-2 config completed with what mlx-lm needs: n_ctx and transformers' default values."""
    full = {**DEFAULTS, **config}
    full.setdefault("n_ctx", full["n_positions"])
    return full


def with_sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a GPT-2 config completed with transformers' default sizes.

    `where` names the file in errors.

    Raises:
        UserError: a size is not a whole number above 0, or n_head does not divide n_embd.
    """
    full = {**DEFAULTS, **config}
    for key in SIZES:
        if not isinstance(full[key], int) or isinstance(full[key], bool) or full[key] < 1:
            raise UserError(f"{where} has {key} {full[key]!r}; it must be a whole number of at least 1")
    if full["n_embd"] % full["n_head"]:
        raise UserError(
            f"{where} has n_embd {full['n_embd']}, which its n_head {full['n_head']} does not "
            "divide; correct one of them"
        )
    return full


def check_shapes(weights: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check the shape of each tensor of an mlx-lm GPT-2 against its config.

    Quantised matrices are packed and not checked.

    Raises:
        UserError: a shape differs; the message gives both.
    """
    width = config["n_embd"]
    sizes = {
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    shapes = {
        "model.wte.weight": (config["vocab_size"], width),
        "model.wpe.weight": (config["n_positions"], width),
    }
    for name in expected_names(config["n_layer"]):
        module, _, kind = name.rpartition(".")
        rows, columns = sizes.get(module.split(".", 3)[-1], (width, width))
        is_matrix = kind == "weight" and _CONV1D_WEIGHT.search(name) is not None
        expected = shapes.get(name, (rows, columns) if is_matrix else (rows,))
        shape = tuple(weights[name].shape)
        if shape != expected and f"{module}.scales" not in weights:
            raise UserError(
                f"{name} has shape {shape}, and config.json asks for {expected} ((out, in) for matrices); "
                "one of the two is wrong"
            )


def same_head(weights: Mapping[str, Any]) -> bool:
    """Return whether mlx-lm's weights hold a head that is a copy of the embedding."""
    table, head = weights.get("model.wte.weight"), weights.get("lm_head.weight")
    if table is None or head is None or tuple(table.shape) != tuple(head.shape):
        return False
    return bool((table == head).all())


def expected_names(n_layer: int) -> list[str]:
    """Return every tensor name of an mlx-lm GPT-2 with `n_layer` blocks, in the model's order."""
    names = ["model.wte.weight", "model.wpe.weight"]
    for i in range(n_layer):
        names += [
            f"model.h.{i}.{module}.{kind}" for module in (*NORMS, *CONV1D) for kind in ("weight", "bias")
        ]
    return [*names, "model.ln_f.weight", "model.ln_f.bias"]


def transposed(matrix: Any) -> Any:
    """Return a matrix (a, b) as (b, a), contiguous where the library needs that; values keep their bits."""
    view = matrix.T
    if hasattr(view, "contiguous"):  # torch: safetensors refuses strided views
        return view.contiguous()
    if type(view).__module__ == "numpy":
        return view.copy(order="C")
    return view  # mlx makes it contiguous when it saves or computes


def _mlx_name(name: str) -> str:
    if name.startswith(("lm_head.", "score.")):
        return name
    return "model." + name.removeprefix("transformer.")


def _tie(weights: Weights, tie_word_embeddings: bool) -> None:
    """Reduce wte and lm_head to one tensor where the model is tied."""
    head = weights.get("lm_head.weight")
    if head is None:
        return
    table = weights.get("model.wte.weight")
    if table is None and tie_word_embeddings:
        # safetensors stores a shared tensor under one of its names, possibly this one.
        weights["model.wte.weight"] = weights.pop("lm_head.weight")
    elif tie_word_embeddings and same_head(weights):
        del weights["lm_head.weight"]
    elif tie_word_embeddings:
        raise UserError(
            "lm_head.weight differs from wte.weight in a tied model; if that is meant, set "
            "tie_word_embeddings to false in config.json"
        )


def _check_names(weights: Mapping[str, Any], n_layer: int) -> None:
    expected = set(expected_names(n_layer))
    missing = [name for name in expected_names(n_layer) if name not in weights]
    if missing:
        raise UserError(
            f"the weights lack {missing[0]}{_and_more(missing)} for a GPT-2 with n_layer {n_layer}"
        )
    known = expected | {"lm_head.weight", "score.weight"}
    # A quantised matrix has .scales and .biases as well as .weight.
    extra = sorted(
        n
        for n in weights
        if n not in known and not (n.endswith(_QUANTISED) and f"{n.rsplit('.', 1)[0]}.weight" in expected)
    )
    if extra:
        raise UserError(
            f"{extra[0]}{_and_more(extra)} is not part of a GPT-2 with n_layer {n_layer}; check "
            "n_layer in config.json"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
