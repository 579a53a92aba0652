"""How the time of a step grows with its rows, and what the memory of the loss depends on.

The time of a step should grow linearly with the tokens it reads and, for the head and the loss, with the
trained tokens; the same number of tokens in longer rows costs more attention. The memory of the loss should
depend neither on the number of positions nor on the vocabulary, because logits exist one chunk at a time
(engines/fused.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.bench.harness import Gate, learning_rate, open_engine
from mlx_posttrain.data.types import Example

MB = 2**20


class Case(NamedTuple):
    """Size of a batch: its rows, the tokens of each row, and how many of those are trained."""

    rows: int
    length: int
    trained: int


#: Batches of more rows, of the same tokens in longer rows, and of more trained tokens.
ROWS = (Case(4, 64, 56), Case(8, 64, 56), Case(16, 64, 56))
LENGTHS = (Case(16, 64, 56), Case(8, 128, 112), Case(4, 256, 224), Case(2, 512, 448))
TRAINED = (Case(16, 64, 8), Case(16, 64, 32), Case(16, 64, 56))
#: Positions and vocabularies of the losses that are measured alone, and the width of their hidden states.
POSITIONS, VOCABULARIES, WIDTH = (1024, 4096), (8192, 50257), 64


def cases(context: int | None) -> list[Case]:
    """The distinct cases that fit a model's context."""
    return [c for c in dict.fromkeys((*ROWS, *LENGTHS, *TRAINED)) if context is None or c.length <= context]


def batch(case: Case, vocabulary: int, context: int | None) -> Any:
    """Rows of random tokens, of which the last ``case.trained`` are trained."""
    from mlx_posttrain.data.batches import collate

    tokens = np.random.default_rng(0).integers(0, vocabulary, (case.rows, case.length))
    trained = (False,) * (case.length - case.trained) + (True,) * case.trained
    return collate([Example(tuple(row.tolist()), trained) for row in tokens], context)


def train(spec: dict[str, Any], gate: Gate) -> None:
    """One full training step of every case per unit, first to last and then back, and the loss's memory.

    The memory of the loss alone is measured after the last unit.
    """
    from mlx_posttrain.engines.base import AdamW
    from mlx_posttrain.methods import sft

    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]))
    trainer = engine.trainer(model, AdamW())
    batches = [
        (case, batch(case, model.config["vocab_size"], model.context)) for case in cases(model.context)
    ]
    while gate.open():
        seconds: list[list[float]] = [[] for _ in batches]
        loss = 0.0
        for i in (*range(len(batches)), *reversed(range(len(batches)))):
            begun = time.perf_counter()
            loss = trainer.step(sft.loss, [batches[i][1]], learning_rate(adapter=False))["loss"]
            engine.synchronize()
            seconds[i].append(time.perf_counter() - begun)
        tokens = 2 * sum(case.rows * case.trained for case, _ in batches)
        timed = [{**case._asdict(), "seconds": s} for (case, _), s in zip(batches, seconds, strict=True)]
        gate.report(loss=loss, rows=2 * sum(case.rows for case, _ in batches), tokens=tokens, cases=timed)
    del model, trainer
    peaks = [
        {"positions": n, "vocabulary": v, "mb": loss_peak(engine.name, n, v), "logits_mb": 4 * n * v / MB}
        for v in VOCABULARIES
        for n in POSITIONS
    ]
    gate.close(device=engine.device(), loss=peaks)


def loss_peak(engine: str, positions: int, vocabulary: int) -> float:
    """Peak memory in MB of a loss and its gradient.

    Not counted are the hidden states, the trained head, and the gradients of both.
    """
    rng = np.random.default_rng(0)
    h, w = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (positions, vocabulary))
    target = rng.integers(0, vocabulary, positions)
    peak = _mlx_peak(h, w, target) if engine == "mlx" else _torch_peak(h, w, target)
    return (peak - h.nbytes - w.nbytes) / MB


def _mlx_peak(h: np.ndarray, w: np.ndarray, target: np.ndarray) -> int:
    import mlx.core as mx

    from mlx_posttrain.engines.mlx import fused as mlx_fused

    targets = mx.array(target.astype(np.int32))

    def loss(h: mx.array, w: mx.array) -> mx.array:
        return -mx.sum(mlx_fused.logprobs(h, w, targets, trained=True, training=True))

    inputs = mx.array(h), mx.array(w)
    mx.eval(inputs, targets)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(*inputs))
    return mx.get_peak_memory() - before


def _torch_peak(h: np.ndarray, w: np.ndarray, target: np.ndarray) -> int:
    import torch

    from mlx_posttrain.engines import process
    from mlx_posttrain.engines.torch import fused as torch_fused

    hidden, weight = (torch.from_numpy(a).requires_grad_(True) for a in (h, w))
    process.forget_process_peak()
    before = process.process_peak()
    (-torch_fused.logprobs(hidden, weight, torch.from_numpy(target)).sum()).backward()
    return process.process_peak() - before


def markdown_lines(engine: str, result: Mapping[str, Any]) -> list[str]:
    """The result of one engine in Markdown.

    result: ``cases``, each with its seconds in all units, and ``loss``, the memory of the loss by size.
    """
    seconds = {Case(c["rows"], c["length"], c["trained"]): c["seconds"] for c in result["cases"]}
    median = {case: statistics.median(s) for case, s in seconds.items()}
    text = [
        f"| {engine}: rows x length | trained tokens | seconds per step | microseconds per token read |",
        "|---|---|---|---|",
    ]
    for case, s in seconds.items():
        spread = f"{median[case]:.4f} [{min(s):.4f}, {max(s):.4f}]"
        read = case.rows * case.length
        text.append(
            f"| {case.rows} x {case.length} | {case.rows * case.trained} | {spread} | "
            f"{1e6 * median[case] / read:.0f} |"
        )
    text += ["", f"- {_rows_line(median)}", f"- {_trained_line(median)}", f"- {_lengths_line(median)}", ""]
    text += [f"| {engine}: positions | vocabulary | MB of the loss | MB of all logits |", "|---|---|---|---|"]
    return text + [
        f"| {p['positions']} | {p['vocabulary']} | {p['mb']:.0f} | {p['logits_mb']:.0f} |"
        for p in result["loss"]
    ]


def _rows_line(median: Mapping[Case, float]) -> str:
    first, last = ROWS[0], ROWS[-1]
    return f"{last.rows / first.rows:.0f} times the rows: {median[last] / median[first]:.2f} times the time"


def _trained_line(median: Mapping[Case, float]) -> str:
    few, some, most = TRAINED
    linear = median[few] + (median[most] - median[few]) * (some.trained - few.trained) / (
        most.trained - few.trained
    )
    shares = (
        f"{few.trained / few.length:.2f}, {some.trained / some.length:.2f} and "
        f"{most.trained / most.length:.2f} of the tokens trained"
    )
    return (
        f"{shares}: {median[few] / median[most]:.2f}, {median[some] / median[most]:.2f} and 1 of the time "
        f"(on a straight line {linear / median[most]:.2f} in the middle)"
    )


def _lengths_line(median: Mapping[Case, float]) -> str:
    fitting: Sequence[Case] = [case for case in LENGTHS if case in median]
    first, last = fitting[0], fitting[-1]
    return (
        f"the same tokens in rows {last.length / first.length:.0f} times as long: "
        f"{median[last] / median[first]:.2f} times the time"
    )
