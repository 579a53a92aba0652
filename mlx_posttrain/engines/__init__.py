"""The two array libraries behind one protocol, engines/base.py."""

from __future__ import annotations

import difflib
import importlib.util
import platform
import sys

from mlx_posttrain.engines import heap
from mlx_posttrain.engines.base import Engine
from mlx_posttrain.errors import UserError

NAMES = ("mlx", "torch")


def available() -> list[str]:
    """Names of the engines installed on this machine, best first."""
    return [name for name in NAMES if importlib.util.find_spec(name)]


def get(name: str = "auto") -> Engine:
    """An engine by name; ``auto`` takes MLX where it is installed, else torch.

    Raises UserError for an unknown name, with the nearest one, and for an engine that is not installed, with
    the command that installs it.
    """
    if name not in (*NAMES, "auto"):
        near = difflib.get_close_matches(name, [*NAMES, "auto"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"engines: {', '.join(NAMES)}, auto"
        raise UserError(f"unknown engine {name!r}; {hint}")
    have = available()
    if name == "auto":
        if not have:
            raise UserError(
                "neither mlx nor torch is installed: run `pip install mlx-posttrain` (Apple Silicon, Linux) "
                "or `pip install 'mlx-posttrain[torch]'`"
            )
        name = have[0]
    if name not in have:
        if name == "mlx" and sys.platform == "darwin" and platform.machine() == "x86_64":
            raise UserError(
                "engine=mlx needs an Apple Silicon Mac and an arm64 Python (run `mlx-posttrain "
                "doctor`); here use engine=torch"
            )
        package = "mlx-posttrain[torch]" if name == "torch" else "mlx-posttrain"
        raise UserError(
            f"engine={name} is not installed: run `pip install '{package}'`, or use "
            f"engine={have[0] if have else 'auto'}"
        )
    heap.keep()
    if name == "mlx":
        from mlx_posttrain.engines.mlx.engine import MLXEngine

        return MLXEngine()
    from mlx_posttrain.engines.torch.engine import TorchEngine

    return TorchEngine()
