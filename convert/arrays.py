"""Conversion of MLX and torch arrays to and from NumPy, and safetensors files read with NumPy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

_NUMPY_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def library(array: Any) -> str:
    """Return "mlx", "torch" or "numpy" for an array of that library."""
    name = type(array).__module__.split(".")[0]
    return name if name in ("mlx", "torch") else "numpy"


def to_float32(array: Any) -> Any:
    """Return a floating array of any library as NumPy float32 of the same shape.

    fp16 and bf16 widen exactly.
    """
    import numpy as np

    kind = library(array)
    if kind == "mlx":
        import mlx.core as mx

        return np.array(array.astype(mx.float32))
    if kind == "torch":
        return array.detach().cpu().float().numpy()
    return np.asarray(array, dtype=np.float32)


def require_mlx(purpose: str) -> None:
    """Raise UserError if MLX is not installed, naming the purpose that needs it."""
    try:
        import mlx.core  # noqa: F401
        import mlx_lm  # noqa: F401
    except ImportError:
        raise UserError(
            f"{purpose} needs MLX, which is not installed: do it on an Apple Silicon Mac or on Linux, after "
            "`pip install mlx-posttrain`"
        ) from None


def like(value: Any, reference: Any) -> Any:
    """Return a NumPy array as an array of the library and type of `reference`."""
    kind = library(reference)
    if kind == "mlx":
        import mlx.core as mx

        return mx.array(value).astype(reference.dtype)
    if kind == "torch":
        import torch

        return torch.from_numpy(value.copy()).to(reference.dtype)
    import numpy as np

    with np.errstate(over="ignore"):  # overflow gives inf without a warning, as in the other libraries
        return value.astype(reference.dtype)


def read_float32(path: Path) -> dict[str, Any]:
    """Return a safetensors file's floating tensors as NumPy float32, without MLX or torch.

    NumPy has no bf16, so that type is widened here.

    Raises:
        UserError: the file is missing or damaged, or holds a type that is not F64, F32, F16 or BF16.
    """
    import numpy as np
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or is not a safetensors file ({error}); download or copy it again"
        ) from None
    out = {}
    for name, tensor in tensors:
        kind = _NUMPY_TYPES.get(tensor["dtype"])
        if kind is None:
            raise UserError(
                f"{path}: {name} has type {tensor['dtype']}; only F32, F16, BF16 and F64 are read"
            )
        if kind == "bfloat16":
            # A bf16 is the upper half of a float32.
            value = (np.frombuffer(tensor["data"], dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            value = np.frombuffer(tensor["data"], dtype=kind).astype(np.float32)
        out[name] = value.reshape(tensor["shape"])
    return out
