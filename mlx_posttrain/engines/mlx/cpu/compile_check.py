"""Whether mx.compile works on this machine.

On the CPU, MLX fuses operations by writing C++, running ``g++`` and loading the result from
``$TMPDIR/mlx/<version>/cpu``. Without a g++ it runs the operations unfused by itself. It does not survive a
g++ that exists and fails (headers missing, disk full), or a temporary folder that is missing, full, mounted
noexec or made by another user. Each of these raises in the middle of a training step, so compiling is tried
here once, on a small function. On the GPU Metal compiles, and no other program is needed.
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
    """Why mx.compile cannot be used on MLX's default device, or None when it can.

    Takes up to 2 s once per machine, then 1 ms.
    """
    try:
        import mlx.core as mx
    except ImportError as error:
        return f"mlx cannot be imported ({error})"
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu and shutil.which("g++") is not None:
        # The compiled probe may be cached from an earlier run; new functions are not.
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
    """Whether training steps may be compiled; uncompiled ones give the same results."""
    return compile_problem() is None


def fuses() -> bool:
    """Whether compiled functions are really fused: on the CPU only with a g++."""
    import mlx.core as mx

    return mx.default_device() != mx.Device(mx.cpu) or shutil.which("g++") is not None


def _probe(x):
    import mlx.core as mx

    return mx.tanh(x * 1.25 + 0.5) * mx.exp(-x) - x
