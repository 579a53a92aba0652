"""Let glibc keep the memory that a step frees for the next step.

By default glibc maps every large block anew and gives it back when it is freed, so that each large array is
paid for with page faults: the kernel clears its pages one by one, on one core. On Linux MLX's CPU backend and
PyTorch both allocate through it, and element-wise operations on arrays of 90 MB took up to seven times as
long for it (docs/speed.md). macOS has another allocator, and MLX's GPU backend a cache of its own: nothing is
done there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
BLOCK = 1 << 30  # larger blocks are mapped and given back, as all large ones were
SPARE = (1 << 31) - 1  # bytes kept free at the top of the heap before any go back


@cache
def keep() -> bool:
    """Set it up once for the process; returns whether it was done for blocks of any size up to ``BLOCK``
    bytes.

    Where the user has settings of their own (``MALLOC_*``, or glibc.malloc in ``GLIBC_TUNABLES``), they are
    left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    # An older glibc takes no more than 32 MB for the first, and goes on mapping what is larger.
    whole = bool(mallopt(_MMAP_THRESHOLD, BLOCK))
    if not whole:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(mallopt(_TRIM_THRESHOLD, SPARE)) and whole


def release() -> None:
    """Give what is free back to the system, so that a measured peak is of what follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
