"""The device that MLX computes on, and what memory a run may take of it.

Metal advises a process to keep within a *working set*, two thirds to three quarters of the machine's memory.
MLX keeps buffers that are no longer used for later arrays of nearly the same size. A GPU pays for a new one
with page faults, so within a phase (training, evaluation, rollout) they are kept, up to probe.CACHE_SHARE of
the working set. The arrays of the next phase have other sizes, so buffers are given back between phases.
MLX's CPU backend on Linux allocates through glibc and keeps 32 MB: engines/mlx/cpu/buffers.py has its rule.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_posttrain.data import batches
from mlx_posttrain.engines import probe, sizes
from mlx_posttrain.engines.mlx.cpu import buffers

_phase = ""
_wired = False


def on_gpu() -> bool:
    """Whether MLX's default device is the GPU."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def working_set() -> int:
    """Bytes that Metal advises a process to use at most; 0 where MLX does not compute on Metal."""
    return probe.working_set() if on_gpu() else 0


def shortens_float32() -> bool:
    """Whether float32 products keep 10 bits of mantissa (TF32), as they do on GPUs from M5 on.

    Those are of generation 17; MLX_ENABLE_TF32=0 in the environment switches it off (mlx issue 3860).
    """
    if not on_gpu() or os.environ.get("MLX_ENABLE_TF32", "1") == "0":
        return False
    generation = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return generation is None or int(generation[1]) >= 17


def prepare() -> None:
    """Fit caches, chunks and padding to the GPU, where there is one; for the whole process."""
    if on_gpu():
        batches.pad_to(batches.COARSE)
    if most := working_set():
        mx.set_cache_limit(int(probe.CACHE_SHARE * most))
        sizes.fit(most)


def begin(phase: str) -> None:
    """Say what the device does next: unused buffers of another phase are given back."""
    global _phase
    if not on_gpu():
        buffers.release()
    elif phase != _phase:
        mx.clear_cache()
    _phase = phase


@contextmanager
def wired() -> Iterator[None]:
    """Keep the process's arrays in memory meanwhile, up to the working set, as mlx-lm does (macOS 15)."""
    global _wired
    most = working_set()
    if not most or _wired:
        yield
        return
    before, _wired = mx.set_wired_limit(most), True
    try:
        yield
    finally:
        mx.synchronize()  # work in progress must not lose what it reads
        mx.set_wired_limit(before)
        _wired = False
