"""Whether mx.compile works on this machine.

On the CPU, MLX fuses operations by writing C++, running ``g++`` and loading the result from
``$TMPDIR/mlx/<version>/cpu``. Without a g++ it runs the operations unfused, by itself. What it does not
survive is a g++ that is there and fails (headers missing, disk full), a temporary folder that is missing,
full or mounted noexec, or one that another user made. Every one of these raises in the middle of a training
step, so it is tried here once, with a function of its own. On the GPU, Metal compiles, and no other program
is needed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def compile_problem() -> str | None:
    """Return why mx.compile cannot be used on MLX's default device, or None when it can. Costs up to 2 s once
    per machine, then 1 ms.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        return f"mlx cannot be imported ({error})"
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu and shutil.which("g++") is not None:
        # the probe itself may be cached from an earlier run, new functions are not
        folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir()) / "mlx"
        for part in (folder, folder / version("mlx"), folder / version("mlx") / "cpu"):
            if part.exists() and not os.access(part, os.W_OK | os.X_OK):
                return f"{part} belongs to somebody else; set TMPDIR to a folder of your own"
    try:
        x = mx.array([0.25, -1.5, 3.0])
        mx.eval(mx.compile(_probe)(x))
    except Exception as error:  # whatever happens here would otherwise end a training run
        return " ".join(str(error).split())[:300]
    return None


def compile_works() -> bool:
    """Say whether training steps may be compiled; the caller runs them uncompiled otherwise, with the same
    results.
    """
    return compile_problem() is None


def fuses() -> bool:
    """Say whether compiled functions are really fused: on the CPU only with a g++."""
    import mlx.core as mx

    return mx.default_device() != mx.Device(mx.cpu) or shutil.which("g++") is not None


def _probe(x):
    import mlx.core as mx

    return mx.tanh(x * 1.25 + 0.5) * mx.exp(-x) - x
