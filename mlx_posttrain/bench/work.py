"""How much a unit of work must do at least, and how much this machine can: arithmetic and reading memory."""

from __future__ import annotations

import math
import os
import time

from mlx_posttrain.bench.material import Shape, rows
from mlx_posttrain.memory.plan import Size


def training_flops(of: Size, what: str, shape: Shape) -> float:
    """Floating-point operations in the matrix products of one pass over the rows, padding and recomputation
    not counted.

    2 for each weight and token forward, 2 for the gradient of the input and, where the weight trains, 2 for
    its own (Kaplan et al. 2020, section 2.1); attention by the length squared, halved because it looks back
    only; the head at trained positions; the reference's pass.
    """
    per_token = sum(map(math.prod, of.linear.values()))
    factor = 4 if what.endswith("lora") else 6
    reference = 2 if what.startswith("kl") else 0
    total = 0.0
    for e in rows(shape, of.vocabulary):
        # a reward model's head is one number a row
        length, trained = len(e.tokens), 0 if what == "reward" else sum(e.trained)
        total += (factor + reference) * (per_token * length + of.width * of.vocabulary * trained) + (
            3 + reference / 2
        ) * _attention(of, length)
    return total


def _attention(of: Size, length: int) -> float:
    """Operations of one row's attention forward, halved because it looks back only."""
    return 2 * 2 * of.layers * of.width * length**2 / 2


def ppo_flops(of: Size) -> float:
    """The same of one PPO iteration of the benchmark, answers of full length, as the algorithm asks for it.

    Decoding with a cache, each prompt read once; policy, reference, critic and reward model once over all
    answers; two epochs of policy and critic. The vocabulary's head in decoding, in policy and reference, and
    in the policy's epochs.
    """
    from mlx_posttrain.bench.worker import ROLLOUT, prompts

    samples, said = ROLLOUT["samples"], ROLLOUT["max_tokens"]
    per_token = 2 * sum(map(math.prod, of.linear.values()))
    head = 2 * of.width * of.vocabulary * said
    total = 0.0
    for prompt in map(len, prompts(of.vocabulary)):
        attention = _attention(of, prompt + said)
        forward = per_token * (prompt + said) + attention
        decoding = per_token * (said + prompt / samples) + attention + head
        measuring, training = 4 * forward + 2 * head, 2 * (2 * 3 * forward + 3 * head)
        total += samples * (decoding + measuring + training)
    return total


def decode_bytes(of: Size, batches: int = 1) -> float:
    """Bytes of weights that decoding reads: all of them for every token of each of ``batches`` decode
    batches.
    """
    from mlx_posttrain.bench.worker import ROLLOUT

    return float(of.file_bytes * ROLLOUT["max_tokens"] * batches)


def peaks(engine: str, seconds: float = 0.5) -> dict[str, float]:
    """``gflops``: the best float32 product; ``gb_per_s``: the best rate at which half a gigabyte is read once
    and added up, on all cores.
    """
    from mlx_posttrain.bench.worker import open_engine
    from mlx_posttrain.doctor import measure_gflops

    name = open_engine(engine).name
    rate = max(measure_gflops(name, size, seconds) for size in (1024, 2048))
    if name == "mlx":
        import mlx.core as mx

        # On a CPU a stream has one thread, so each core gets a stream and a part.
        device = mx.default_device()
        cores = (os.cpu_count() or 1) if engine == "mlx-cpu" else 1
        parts = [(mx.ones((2**27 // cores,)), mx.new_stream(device)) for _ in range(cores)]
        mx.eval([values for values, _ in parts])

        def read() -> None:
            mx.eval([mx.sum(values, stream=stream) for values, stream in parts])
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
