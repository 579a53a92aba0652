"""How much a unit of work must do at least, and how much this machine can: arithmetic and reading memory."""

from __future__ import annotations

import math
import time

from mlx_posttrain.bench.material import Shape, rows
from mlx_posttrain.plan import Size


def training_flops(of: Size, what: str, shape: Shape) -> float:
    """Floating-point operations in the matrix products of one pass over the rows, padding and recomputation not counted.

    2 for each weight and token forward, 2 for the gradient of the input and, where the weight trains, 2 for its own (Kaplan et al. 2020,
    section 2.1); attention by the length squared, halved because it looks back only; the head at trained positions; the reference's pass.
    """
    per_token = sum(map(math.prod, of.linear.values()))
    factor = 4 if what.endswith("lora") else 6
    reference = 2 if what.startswith("kl") else 0
    total = 0.0
    for e in rows(shape, of.vocabulary):
        length, trained = len(e.tokens), sum(e.trained)
        attention = 2 * 2 * of.layers * of.width * length**2 / 2
        total += (factor + reference) * (per_token * length + of.width * of.vocabulary * trained) + (3 + reference / 2) * attention
    return total


def decode_bytes(of: Size) -> float:
    """Bytes of weights that decoding reads: all of them for every token of the batch's rows."""
    from mlx_posttrain.bench.worker import ROLLOUT

    return float(of.file_bytes * ROLLOUT["max_tokens"])


def peaks(engine: str, seconds: float = 0.5) -> dict[str, float]:
    """``gflops``: the best float32 product; ``gb_per_s``: the best rate at which half a gigabyte is read once and added up."""
    from mlx_posttrain.bench.worker import open_engine
    from mlx_posttrain.doctor import measure_gflops

    name = open_engine(engine).name
    rate = max(measure_gflops(name, size, seconds) for size in (1024, 2048))
    if name == "mlx":
        import mlx.core as mx

        values = mx.ones((2**27,))
        mx.eval(values)

        def read() -> None:
            mx.eval(mx.sum(values))
    else:
        import torch

        tensor = torch.ones(2**27)

        def read() -> None:
            tensor.sum().item()

    read()
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - begun)
    return {"gflops": rate, "gb_per_s": 2**29 / best / 1e9}
