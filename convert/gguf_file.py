"""GGUF files, which llama.cpp and Ollama run, from a model folder in Hugging Face's format.

The format, the names of tensors and the number formats are those of llama.cpp's own package `gguf`; what is
here is what its converter does for three architectures, with tensors read and written one at a time.
llama.cpp computes rotary positions of a Llama on neighbouring pairs of a head's rows, transformers on its two
halves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

from .arrays import to_float32
from .checks import check_finite
from .files import require_space
from .hub import check_config
from .names import hf_weights
from .weights import GPT2_FIXED, load_weights

#: Number formats of a file, by the name that GGUF has for them.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}

#: Settings with which llama.cpp computes what transformers does, by architecture.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": GPT2_FIXED,
    "llama": {"hidden_act": ("silu",)},
    "qwen2": {"hidden_act": ("silu",), "use_sliding_window": (False,)},
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "use_regex": True}
#: llama.cpp's names of the ways in which text is cut into words before byte-pair encoding.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": _LETTERS + r"\p{N}{1,3}" + _REST}}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": _LETTERS + r"\p{N}" + _REST}}],
}


def require_gguf() -> Any:
    """Return the package `gguf`. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError('GGUF files need the package gguf: pip install "mlx-posttrain[gguf]"') from None
    return gguf


def check_model(folder: Path) -> dict[str, Any]:
    """Return the config of a folder that can be written as GGUF. Raises UserError for any other."""
    config = check_config(folder)
    kind = config["model_type"]
    if kind not in FIXED:
        raise UserError(f"{kind} is not written as GGUF here ({', '.join(FIXED)} are): {_ELSEWHERE}")
    for key, allowed in FIXED[kind].items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"config.json has {key} {config[key]!r}, which llama.cpp does not compute for {kind} "
                f"(it computes {allowed[0]!r}): use --to hf or --to mlx-lm"
            )
    if config.get("quantization"):
        raise UserError(f"{folder} is quantised for MLX: give a model that is not")
    _rope(config)
    return config


_ELSEWHERE = "export --to hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def write_gguf(
    folder: Path,
    file: Path,
    tokenizer: Any,
    *,
    dtype: str,
    name: str,
    template: str | None,
    ends: Sequence[int],
    bos: bool,
) -> None:
    """Write a model folder as one GGUF file.

    dtype: a key of TYPES, for matrices; vectors and positions are float32, as llama.cpp needs them, and rows
    that q8_0's blocks of 32 do not divide float16. template: the chat template in Jinja. ends: the ids that
    end an answer, EOS first. bos: whether every text begins with BOS.

    Raises UserError as check_model, for a tokenizer that llama.cpp does not have, for values that are no
    numbers or beyond float16's range, and for a full disk.
    """
    import numpy as np

    gguf = require_gguf()
    config = check_model(folder)
    tensors = dict(_tensors(gguf, folder, config))
    kinds = {key: _kind(gguf, key, value.shape, TYPES[dtype]) for key, value in tensors.items()}
    sizes = {key: _bytes(gguf, value.shape, kinds[key]) for key, value in tensors.items()}
    require_space(file.parent, sum(sizes.values()))
    writer = gguf.GGUFWriter(file, config["model_type"])
    try:
        writer.add_name(name)
        writer.add_file_type(_file_type(gguf, dtype))
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(gguf, writer, config)
        _add_tokenizer(gguf, writer, tokenizer, tensors["token_embd.weight"].shape[0])
        writer.add_add_bos_token(bos)
        writer.add_eos_token_id(ends[0])
        if len(ends) > 1:
            writer.add_eot_token_id(ends[1])
        if template is not None:
            writer.add_chat_template(template)
        for key, value in tensors.items():
            writer.add_tensor_info(key, value.shape, np.dtype(np.float32), sizes[key], kinds[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, value in tensors.items():
            writer.write_tensor_data(_packed(gguf, key, to_float32(value), kinds[key]))
    finally:
        writer.close()


def _tensors(gguf: Any, folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A folder's tensors under GGUF's names, matrices (out, in), in MLX read on first use."""
    kind = config["model_type"]
    weights = hf_weights(load_weights(folder), config)
    check_finite(weights.items(), folder)
    if config.get("tie_word_embeddings", kind == "gpt2"):
        weights.pop("lm_head.weight", None)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    names = gguf.get_tensor_name_map(arch, _layers(config))
    heads = config.get("num_attention_heads", 0)
    groups = config.get("num_key_value_heads") or heads
    for key, value in weights.items():
        if key.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):  # masks, not weights
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{folder}: GGUF has no name for {key}, so the model cannot be written")
        if kind == "gpt2" and value.ndim == 2 and ".h." in key:
            value = value.T
        if kind == "llama" and ".attn_q." in found:
            value = _pairs(value, heads)
        elif kind == "llama" and ".attn_k." in found:
            value = _pairs(value, groups)
        yield found, value
    factors = _llama3_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _pairs(value: Any, heads: int) -> Any:
    """Rows of each head from two halves into neighbouring pairs."""
    rest = value.shape[1:]
    half = value.shape[0] // heads // 2
    return value.reshape(heads, 2, half, *rest).swapaxes(1, 2).reshape(value.shape)


def _layers(config: Mapping[str, Any]) -> int:
    return int(config["n_layer"] if config["model_type"] == "gpt2" else config["num_hidden_layers"])


def context_length(config: Mapping[str, Any]) -> int:
    """The longest text that a model takes, in tokens."""
    return int(config["n_positions"] if config["model_type"] == "gpt2" else config["max_position_embeddings"])


def _kind(gguf: Any, name: str, shape: tuple[int, ...], wanted: str) -> Any:
    if len(shape) == 1 or name.startswith("position_embd"):
        wanted = "F32"
    elif wanted == "Q8_0" and shape[-1] % 32:
        wanted = "F16"
    return gguf.GGMLQuantizationType[wanted]


def _bytes(gguf: Any, shape: tuple[int, ...], kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _file_type(gguf: Any, dtype: str) -> Any:
    name = TYPES[dtype]
    return gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def _packed(gguf: Any, name: str, value: Any, kind: Any) -> Any:
    import numpy as np

    if kind == gguf.GGMLQuantizationType.F16 and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
        raise UserError(f"{name} holds values beyond float16's range (65504); use --dtype bfloat16")
    return gguf.quants.quantize(np.ascontiguousarray(value), kind)


def _add_sizes(gguf: Any, writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(context_length(config))
    writer.add_block_count(_layers(config))
    if config["model_type"] == "gpt2":
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
        return
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    kind, theta, rope = _rope(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Mapping[str, Any]) -> tuple[str, float, Mapping[str, Any]]:
    """The kind of rotary positions, their base, and all their settings. Raises UserError for other kinds."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rotary positions of the kind {kind} are not written as GGUF here: {_ELSEWHERE}")
    return kind, float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0), rope


def _llama3_factors(config: Mapping[str, Any]) -> Any:
    """What Llama 3.1's frequencies are divided by, [head width / 2] float32; None for other models."""
    import numpy as np

    kind, theta, rope = _rope(config)
    if kind != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turns = theta ** -(np.arange(0, width, 2) / width) / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    within = rope["original_max_position_embeddings"] * turns
    smooth = np.clip((within - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json cuts text into words.

    llama.cpp's own converter knows tokenizers by a hash of what they make of a sample text, which no
    tokenizer trained anew has; what decides is in the file.

    Raises UserError for a tokenizer that is not one of PRE_TOKENIZERS with byte-pair encoding.
    """
    model, cut = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    normalizer = spec.get("normalizer")
    steps = [cut] if cut.get("type") != "Sequence" else cut["pretokenizers"]
    if (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and (normalizer is None or normalizer.get("type") == "NFC")
        and not any(step.get("add_prefix_space") for step in steps)
    ):
        for name, wanted in PRE_TOKENIZERS.items():
            # behind a Split by a regular expression the last step only writes bytes as letters
            known = wanted if wanted[-1] is _BYTES else [*wanted, {"type": "ByteLevel", "use_regex": False}]
            ignores = bool(model.get("ignore_merges")) == (name == "llama-bpe")
            if ignores and len(steps) == len(known) and all(map(_has, steps, known)):
                return name
    raise UserError(
        "llama.cpp has no tokenizer like this model's (byte-level byte-pair encoding that cuts words as "
        f"GPT-2, SmolLM, Llama 3 or Qwen2 does can be written): {_ELSEWHERE}"
    )


def _has(step: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(step.get(key, True if key == "use_regex" else None) == value for key, value in wanted.items())


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Any, rows: int) -> None:
    """rows: of the embedding, which may have more than the tokenizer has tokens."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(spec))
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = []
    for number in range(rows):
        if number not in texts:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number].special
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(kinds)
    merges = spec["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for add, token in ((writer.add_bos_token_id, "bos"), (writer.add_pad_token_id, "pad")):
        number = getattr(tokenizer, f"{token}_token_id")
        if number is not None:
            add(number)
