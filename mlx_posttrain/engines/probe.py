"""What the array libraries say of this machine: their devices, and how fast they multiply."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

#: Share of Metal's working set that MLX's unused buffers may take.
CACHE_SHARE = 0.25


class Devices(NamedTuple):
    """MLX's devices: Metal's facts about the GPU, None without one, and which device is the default."""

    gpu: dict[str, Any] | None
    default: str


def mlx_devices() -> Devices:
    """The devices that MLX has in this process."""
    import mlx.core as mx

    if not mx.is_available(mx.Device(mx.gpu)):
        return Devices(None, "cpu")
    default = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    return Devices(dict(mx.device_info(mx.Device(mx.gpu))), default)


def working_set() -> int:
    """Bytes that Metal advises a process to use at most; 0 without Metal."""
    gpu = mlx_devices().gpu
    return int(gpu.get("max_recommended_working_set_size", 0)) if gpu else 0


def torch_threads() -> int:
    """Threads that PyTorch computes with."""
    import torch

    return torch.get_num_threads()


def measure_gflops(engine: str = "mlx", size: int = 1024, seconds: float = 0.25) -> float:
    """Return the best float32 matmul rate of an engine in GFLOP/s.

    ``engine`` is mlx or torch, on its default device. The measurement takes about ``seconds``.
    """
    if engine == "torch":
        import torch

        a = torch.rand(size, size)

        def multiply() -> None:
            torch.mm(a, a)
    else:
        import mlx.core as mx

        b = mx.random.uniform(shape=(size, size))
        mx.eval(b)

        def multiply() -> None:
            mx.eval(b @ b)

    multiply()  # starts the threads; with the reference BLAS one product of this size takes .4 s
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
