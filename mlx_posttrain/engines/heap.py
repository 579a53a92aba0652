"""Let glibc keep the memory that a step frees for the next step.

By default glibc maps every large block afresh and returns it to the system when it is freed, so each large
array costs page faults: the kernel clears its pages one by one, on one core. On Linux MLX's CPU backend and
PyTorch both allocate through glibc, and element-wise operations on arrays of 90 MB took up to seven times as
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
BLOCK = 1 << 30  # bytes above which a block is still mapped and returned
SPARE = (1 << 31) - 1  # bytes kept free at the top of the heap before any are returned


@cache
def keep() -> bool:
    """Set glibc's thresholds, once for the process.

    Returns whether glibc accepted them for blocks of any size up to ``BLOCK`` bytes. A user's own settings
    (``MALLOC_*``, or glibc.malloc in ``GLIBC_TUNABLES``) are left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if chosen or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    # An older glibc accepts at most 32 MB as its mmap threshold and keeps mapping larger blocks.
    accepted = bool(mallopt(_MMAP_THRESHOLD, BLOCK))
    if not accepted:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(mallopt(_TRIM_THRESHOLD, SPARE)) and accepted


def release() -> None:
    """Return free memory to the system, so that a measured peak is that of what follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
