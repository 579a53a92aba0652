"""What is refused in a model folder before anything is made of it: impossible sizes, NaN, links elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

from .arrays import library
from .files import count_tokens, read_json
from .mlx_config import ARCHITECTURES

#: Sizes in config.json that are one whole number in every architecture.
_WHOLE = (
    *("n_layer", "num_hidden_layers", "n_embd", "hidden_size", "n_head", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "n_inner", "vocab_size", "n_positions", "max_position_embeddings"),
)
#: Sizes in config.json: of a stack of layers, and of the sides of tensors.
_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")
_SIDES = ("n_embd", "hidden_size", "d_model", "n_positions", "vocab_size", "intermediate_size", "n_inner")
_MOST_LABELS = 100_000  # transformers writes a name for each
_PACKED = 16  # of a matrix in 2 bits, a side is stored 16 values to an entry


def check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Check that a config's sizes are whole numbers, and its sections objects; `where` names it in errors.

    Raises:
        UserError: one is not.
    """
    for key in _WHOLE:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"{where} has {key} {repr(value)[:40]}; it must be a whole number of at least 1")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        labels = section.get("num_labels")
        if labels is not None and (type(labels) is not int or not 0 <= labels <= _MOST_LABELS):
            raise UserError(
                f"{where} has num_labels {repr(labels)[:40]}; it must be a whole number to {_MOST_LABELS:,}"
            )
    for key in ("quantization", "quantization_config", "text_config"):
        if not isinstance(config.get(key), dict | None):
            raise UserError(f"{where} has {key} {repr(config[key])[:40]}; it must be an object")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("awq", "gptq"):
        raise UserError(
            f"{where}: the weights are quantised by {method}, which is not supported: give the model that "
            "they were made from"
        )
    bits = (config.get("quantization") or {}).get("bits", 4)
    if bits not in range(1, 17):
        raise UserError(f"{where} has quantization.bits {repr(bits)[:40]}; it must be a whole number to 16")


def check_sizes(folder: Path, shards: list[str]) -> None:
    """Compare a config's sizes with the headers of the weight files, before anything of that size is made.

    Raises:
        UserError: sizes by another architecture's names or far beyond what the files hold, or weights that
            are whole numbers or truth values.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    others = [name for name in ARCHITECTURES if name != "gpt2"]
    if kind in others and "n_embd" in config and "hidden_size" not in config:
        raise UserError(
            f"{folder}: config.json has model_type {kind!r} and the sizes of a GPT-2 (n_embd): one of the "
            "two is wrong"
        )
    tensors: dict[str, dict[str, Any]] = {}
    for shard in shards:
        tensors |= _header(folder / shard)
    quantised = any(config.get(key) for key in ("quantization", "quantization_config"))
    for name, tensor in tensors.items():
        if not quantised and name.endswith(".weight") and not tensor["dtype"].startswith(("F", "BF")):
            raise UserError(
                f"{folder}: {name} has type {tensor['dtype']}, and weights are floating-point numbers"
            )
    longest = max((max(tensor["shape"], default=1) for tensor in tensors.values()), default=1)
    for keys, most in ((_LAYERS, len(tensors)), (_SIDES, _PACKED * longest)):
        for key in keys:
            value = config.get(key)
            if isinstance(value, int | float) and not value <= most:
                raise UserError(
                    f"{folder}: config.json has {key} {value}, and the weights have {len(tensors)} tensors, "
                    f"with sides of at most {longest}; one of the two is wrong"
                )


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Return {tensor: {dtype, shape, ...}} of a safetensors file that `check_tensors` accepts."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header: dict[str, Any] = json.loads(f.read(length))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def stored_dtype(folder: Path, shards: list[str]) -> str:
    """Return the number format of most of a model folder's weights: float32, bfloat16 or float16.

    Packed weights do not count, and formats that are only read (float64) are float32 here.
    """
    numbers: Counter[str] = Counter()
    for shard in shards:
        for tensor in _header(folder / shard).values():
            numbers[str(tensor["dtype"])] += math.prod(tensor["shape"])
    halves = {"BF16": "bfloat16", "F16": "float16"}
    floats = {kind: count for kind, count in numbers.items() if kind.startswith(("F", "BF"))}
    return halves.get(max(floats, key=lambda kind: floats[kind], default=""), "float32")


def check_links(folder: Path) -> None:
    """Check that no file of a model folder is a link to a file elsewhere, which would be copied along.

    The hub's cache is made of links into its own `blobs`.

    Raises:
        UserError: one is.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append((folder.parent.parent / "blobs").resolve())
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in inside):
            raise UserError(
                f"{file} is a link to {os.readlink(file)}, outside of the model folder, and is not followed; "
                "copy the file there if it belongs to the model"
            )


def check_finite(weights: Iterable[tuple[str, Any]], where: object) -> None:
    """Check MLX or torch arrays by name for NaN; infinities stay, as masks have them.

    Raises:
        UserError: an array has one.
    """
    for name, array in weights:
        if library(array) == "torch":
            bad = array.is_floating_point() and bool(array.isnan().any())
        else:
            import mlx.core as mx

            bad = mx.issubdtype(array.dtype, mx.floating) and bool(mx.isnan(array).any())
        if bad:
            raise UserError(
                f"{where}: {name} holds values that are no numbers (NaN): the file is damaged, or the "
                "training that made it had diverged; download it again, or take an earlier one"
            )


def check_tokens(source: Path, config: Mapping[str, Any]) -> None:
    """Check that a model has an embedding row for each token of its tokenizer.

    Raises:
        UserError: it has fewer.
    """
    tokens, rows = count_tokens(source), config.get("vocab_size")
    if tokens is not None and isinstance(rows, int) and tokens > rows:
        raise UserError(
            f"{source}: the tokenizer has {tokens} tokens and the model's embedding {rows}: they do not "
            "belong together"
        )
