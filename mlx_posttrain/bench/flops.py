"""The least arithmetic and memory traffic of a unit of work, and this machine's peaks of both."""

from __future__ import annotations

import math
import os
import time

from mlx_posttrain.bench.harness import ROLLOUT, open_engine, prompts
from mlx_posttrain.bench.inputs import Shape, labelled, rows
from mlx_posttrain.bench.kinds import Kind
from mlx_posttrain.memory.model_size import Size


def training_flops(size: Size, kind: Kind, shape: Shape) -> float:
    """Floating-point operations in the matrix products of one pass over the rows.

    Each weight costs 2 per token forward, 2 for the gradient of its input and, where it is trained, 2 for its
    own gradient (Kaplan et al. 2020, section 2.1). Attention grows with the square of the length and is
    halved because it is causal. The head counts at trained positions only. The reference's forward pass is
    included, and that of mismatched answers; padding, shared prompts and recomputation are not.
    """
    per_token = sum(map(math.prod, size.linear.values()))
    factor = 4 if kind.adapter else 6
    reference = 2 if kind.reference_pass else 0
    examples = rows(shape, size.vocabulary)
    work = [(e, factor + reference, 3 + reference / 2) for e in examples]
    if kind.labelled:
        judged = labelled(examples, max(1, shape.batch_size // 2))
        work = [(item.answer, factor, 3) for item in judged] + [(item.mismatched, 2, 1) for item in judged]
    total = 0.0
    for e, passes, attended in work:
        # a reward model's head is one number a row
        length, trained = len(e.tokens), 0 if kind.scores else sum(e.trained)
        total += passes * (per_token * length + size.width * size.vocabulary * trained)
        total += attended * _attention(size, length)
    return total


def _attention(size: Size, length: int) -> float:
    """Operations of one row's attention in a forward pass, halved because it is causal."""
    return 2 * 2 * size.layers * size.width * length**2 / 2


def rollout_flops(size: Size, kind: Kind, shape: Shape) -> float:
    """Floating-point operations of one iteration on rollouts, with answers of full length.

    Counted are decoding with a cache, which reads each prompt once; the passes over all answers before the
    updates, of the policy or, for PPO in float32, of reference, critic and reward model; and the epochs of
    updates. The vocabulary's head counts in decoding, in the passes of policy and reference, and in the
    policy's epochs.
    """
    samples, generated = ROLLOUT["samples"], ROLLOUT["max_tokens"]
    per_token = 2 * sum(map(math.prod, size.linear.values()))
    head = 2 * size.width * size.vocabulary * generated
    algorithm = kind.algorithm
    total = 0.0
    for prompt in map(len, prompts(size.vocabulary, shape.length)):
        attention = _attention(size, prompt + generated)
        linear = per_token * (prompt + generated)
        forward = linear + attention
        decoding = per_token * (generated + prompt / samples) + attention + head
        before = forward + head if algorithm.measured and not algorithm.trusts_sampler else 0
        updates = (2 if kind.adapter else 3) * (linear + head) + 3 * attention
        if algorithm.critic is not None:
            before += 3 * forward + head
            updates += 3 * forward
        total += samples * (decoding + before + algorithm.epochs * updates)
    return total


def decode_bytes(size: Size, batches: int = 1, dtype: str = "float32") -> float:
    """Bytes of weights that decoding reads: all of them per token of each of ``batches`` decode batches."""
    width = 4 if dtype == "float32" else 2
    weights = size.file_bytes if size.packed else width * sum(map(math.prod, size.tensors.values()))
    return float(weights * ROLLOUT["max_tokens"] * batches)


def peaks(engine: str, seconds: float = 0.5) -> dict[str, float]:
    """This machine's peaks on an engine's device.

    ``gflops`` is that of the fastest chained float32 matrix products of up to 4,096 rows, in GFLOP/s;
    ``gb_per_s`` the highest rate, in GB/s, at which all cores together read and sum half a gigabyte.
    """
    from mlx_posttrain.engines.probe import measure_gflops

    name = open_engine(engine).name
    rate = max(measure_gflops(name, n, seconds) for n in (1024, 2048, 4096))
    if name == "mlx":
        import mlx.core as mx

        # on a CPU a stream has one thread, so each core gets a stream and a part
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
