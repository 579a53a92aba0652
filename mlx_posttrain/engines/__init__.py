"""The two array libraries behind one protocol (base.py)."""

from __future__ import annotations

import importlib.util
import platform
import sys

from mlx_posttrain import heap
from mlx_posttrain.engines.base import Engine
from mlx_posttrain.errors import UserError


def available() -> list[str]:
    """Engines this machine can run, best first."""
    return [name for name, module in (("mlx", "mlx"), ("torch", "torch")) if importlib.util.find_spec(module)]


def get(name: str = "auto") -> Engine:
    """An engine by name; ``auto`` takes MLX where it is installed, else torch.

    Raises UserError saying how to install what is missing.
    """
    have = available()
    if name == "auto":
        if not have:
            raise UserError(
                "neither mlx nor torch is installed: run `pip install mlx-posttrain` (Apple Silicon, Linux) or `pip install 'mlx-posttrain[torch]'`"
            )
        name = have[0]
    if name not in have:
        if name == "mlx" and sys.platform == "darwin" and platform.machine() == "x86_64":
            raise UserError("engine=mlx needs an Apple Silicon Mac and an arm64 Python (run `mlx-posttrain doctor`); here use engine=torch")
        package = "mlx-posttrain[torch]" if name == "torch" else "mlx-posttrain"
        raise UserError(f"engine={name} is not installed: run `pip install '{package}'`, or use engine={have[0] if have else 'auto'}")
    heap.keep()
    if name == "mlx":
        from mlx_posttrain.engines.mlx import MLXEngine

        return MLXEngine()
    from mlx_posttrain.engines.torch import TorchEngine

    return TorchEngine()
