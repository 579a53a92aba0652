"""What the array libraries say of this machine: their devices, and how fast they multiply."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

#: Share of Metal's working set that MLX's unused buffers may take.
CACHE_SHARE = 0.25
#: Products that are waited for together at most.
LONGEST_CHAIN = 64


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

    ``engine`` is mlx or torch, on its default device. Products are chained, each of the last one's result,
    and waited for together, so that a GPU does not pause between them. The measurement takes about
    ``seconds``, and at least the time of two products.
    """
    # numbers of mean 1 / size: every product has the same size as its factors
    if engine == "torch":
        import torch

        a = torch.rand(size, size) * (2 / size)

        def multiply(times: int) -> None:
            y = a
            for _ in range(times):
                y = torch.mm(y, a)
    else:
        import mlx.core as mx

        b = mx.random.uniform(high=2 / size, shape=(size, size))
        mx.eval(b)

        def multiply(times: int) -> None:
            x = b
            for _ in range(times):
                x = x @ b
            mx.eval(x)

    multiply(1)  # starts the threads; with the reference BLAS one product of this size takes .4 s
    best, times, end = 0.0, 1, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        multiply(times)
        took = time.perf_counter() - start
        best = max(best, times / took)
        times = min(2 * times, LONGEST_CHAIN) if took < seconds / 8 else times
    return 2 * size**3 * best / 1e9
