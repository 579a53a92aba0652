"""Merge a LoRA or DoRA adapter into the base weights, and measure how much a quantised base keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_posttrain.errors import UserError

from .adapters import Module, scale_of
from .arrays import like, to_float32
from .gpt2 import is_conv1d
from .names import hf_path


def merge(
    base: Mapping[str, Any],
    modules: Mapping[str, Module],
    config: Mapping[str, Any],
    model_type: str = "gpt2",
) -> dict[str, Any]:
    """Return the base weights with the adapter folded in, under Hugging Face's names.

    Sums are in float32, results in each weight's type. `modules` are in mlx-lm's layout and `config` is
    PEFT's, as `read_adapter` returns them. GPT-2 weights may have bare or `transformer.` names and are (in,
    out); other architectures' are (out, in). Source: PEFT's `Linear.merge` and
    `DoraLinearVariant.merge_safe`.

    Raises:
        UserError: the base has no such module, the shapes differ, or the result exceeds the range of the
            weight's type.
    """
    import numpy as np

    merged = dict(base)
    for path, module in modules.items():
        name = _weight_name(base, hf_path(path, model_type))
        stored = to_float32(base[name])
        conv1d = model_type == "gpt2" and is_conv1d(path)
        weight = stored.T if conv1d else stored
        update = delta(module, scale_of(config, path, model_type))
        if weight.shape != update.shape:
            raise UserError(
                f"the adapter does not fit this base: {name} is {tuple(weight.shape)} (out, "
                f"in), its update is {update.shape}"
            )
        result = fold(weight, update, module.get("m"))
        out = like(np.ascontiguousarray(result.T if conv1d else result), base[name])
        if not np.isfinite(to_float32(out)).all() and np.isfinite(stored).all():
            raise UserError(
                f"merging {path} leaves the range of {base[name].dtype}; convert the base to float32 first"
            )
        merged[name] = out
    return merged


def delta(module: Module, scale: float) -> Any:
    """Return an adapter's update of the weight, scale * B A, as NumPy float32 (out, in)."""
    import numpy as np

    product = to_float32(module["lora_a"]) @ to_float32(module["lora_b"])
    return (np.float32(scale) * product).T


def fold(weight: Any, update: Any, magnitude: Any | None = None) -> Any:
    """Return weight + update, (out, in) in NumPy float32.

    DoRA's magnitude (out,) sets the length of every row (arXiv:2402.09353, eq. 5).
    """
    import numpy as np

    total = weight + update
    if magnitude is None:
        return total
    return total * (to_float32(magnitude) / np.linalg.norm(total, axis=1))[:, None]


def quantised_drift(
    weight: Any, update: Any, bits: int, group_size: int = 64, mode: str = "affine"
) -> dict[str, float]:
    """Return how much of an update remains when the sum of weight and update is quantised again.

    `weight` (out, in) is dequantised, `update` is (out, in). With kept = dequantise(quantise(weight +
    update)) - weight: "cosine" between kept and update, "norm_ratio" |kept| / |update|, "error" |kept -
    update| / |update|, and "update_ratio" |update| / |weight|, the size of the update. A zero update gives
    cosine 1 and ratios 0.
    """
    import mlx.core as mx
    import numpy as np

    weight, update = to_float32(weight), to_float32(update)
    size = float(np.linalg.norm(update))
    if size == 0.0:
        return {"cosine": 1.0, "norm_ratio": 0.0, "error": 0.0, "update_ratio": 0.0}
    packed = mx.quantize(mx.array(weight + update), group_size=group_size, bits=bits, mode=mode)
    kept = to_float32(mx.dequantize(*packed, group_size=group_size, bits=bits, mode=mode)) - weight
    kept_size = float(np.linalg.norm(kept))
    cosine = float(np.sum(kept * update)) / (kept_size * size) if kept_size else 0.0
    return {
        "cosine": cosine,
        "norm_ratio": kept_size / size,
        "error": float(np.linalg.norm(kept - update)) / size,
        "update_ratio": size / max(float(np.linalg.norm(weight)), 1e-30),
    }


def logit_drift(adapted: Any, other: Any, base: Any) -> dict[str, float]:
    """Return how far `other` logits are from those of a base with its adapter; all [..., V] in NumPy.

    "lost": rms of (other - adapted) over rms of (adapted - base), 0 for equal logits, about 1 if the adapter
    is lost; "max_logit_difference": the largest |other - adapted|; "kl": mean KL(adapted || other) in nats
    per position.
    """
    import numpy as np

    adapted, other, base = (np.asarray(x, np.float64) for x in (adapted, other, base))
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (adapted, other))
    return {
        "lost": float(np.sqrt(np.mean((other - adapted) ** 2) / max(np.mean((adapted - base) ** 2), 1e-20))),
        "max_logit_difference": float(np.abs(other - adapted).max()),
        "kl": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
    }


def _weight_name(base: Mapping[str, Any], module: str) -> str:
    for name in (f"{module}.weight", f"{module.removeprefix('transformer.')}.weight"):
        if name in base:
            return name
    raise UserError(f"the adapter does not fit this base: the base has no {module}")
