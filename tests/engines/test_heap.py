"""glibc keeps freed memory in a process that uses an engine, unless the user has settings of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import resource, numpy as np
from mlx_posttrain.engines import heap
kept = heap.keep()
np.ones(30_000_000, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(30_000_000, np.float32)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**settings: str) -> tuple[bool, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env | settings, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_used_again():
    kept, count = faults()
    if not kept:
        pytest.skip("another C library")
    left, usual = faults(MALLOC_ARENA_MAX="4")
    assert not left and count < usual / 10


@pytest.mark.skipif(sys.platform.startswith("linux"), reason="done on Linux only")
def test_nothing_is_done_elsewhere():
    assert faults()[0] is False
