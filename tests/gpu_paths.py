"""MLX as on a GPU: without what exists for its CPU backend on Linux only, and keeping unused buffers.

``pytest --gpu-paths`` runs tests so, ``make test-gpu-paths`` those that it matters to, and the fixture
``gpu_paths`` a single test. As a script this file is the command line under the same switch, for tests that
start processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

#: Set in the environment of a session under ``--gpu-paths``.
CHOSEN = "MLX_POSTTRAIN_TEST_GPU_PATHS"


def switch_off(replace: Callable[[object, str, object], None] = setattr) -> None:
    """Take MLX's own exp, attention and activation, and decode, as on a GPU.

    Networks that are loaded already keep theirs. replace: called as ``setattr`` is.
    """
    import mlx.core as mx

    from mlx_posttrain.engines.mlx import decoding
    from mlx_posttrain.engines.mlx.cpu import attention, exp, gelu

    replace(decoding, "on_gpu", lambda: True)
    replace(exp, "is_scalar", lambda: False)
    replace(attention, "is_scalar", lambda: False)
    replace(gelu, "use_in", lambda net: None)
    mx.set_cache_limit(1 << 40)


def chosen() -> bool:
    """Whether this session runs under ``--gpu-paths``."""
    return CHOSEN in os.environ


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    switch_off()
    from mlx_posttrain.cli import main

    main()
