"""What a step costs against its rows, their length and their trained tokens, and what the memory of the loss
depends on.

A step should take a time that grows with the tokens read and, for the head and the loss, with the trained
tokens, on a straight line; longer rows of the same number of tokens cost attention more. The loss should take
a memory that knows neither the number of positions nor the vocabulary, since logits exist a chunk at a time
(engines/fused.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.bench.worker import Gate, learning_rate, open_engine
from mlx_posttrain.data.types import Example

MB = 2**20


class Case(NamedTuple):
    """A batch: rows, tokens of each, and how many of those are trained."""

    rows: int
    length: int
    trained: int


#: More rows; the same tokens in longer rows; fewer of them trained.
ROWS = (Case(4, 64, 56), Case(8, 64, 56), Case(16, 64, 56))
LENGTHS = (Case(16, 64, 56), Case(8, 128, 112), Case(4, 256, 224), Case(2, 512, 448))
TRAINED = (Case(16, 64, 8), Case(16, 64, 32), Case(16, 64, 56))
#: Positions and vocabularies whose loss is measured alone, on hidden states of this width.
POSITIONS, VOCABULARIES, WIDTH = (1024, 4096), (8192, 50257), 64


def cases(context: int | None) -> list[Case]:
    """The distinct ones that fit a model's context."""
    return [c for c in dict.fromkeys((*ROWS, *LENGTHS, *TRAINED)) if context is None or c.length <= context]


def batch(case: Case, vocabulary: int, context: int | None) -> Any:
    """Rows of random tokens whose last ones are trained."""
    from mlx_posttrain.data.batches import collate

    tokens = np.random.default_rng(0).integers(0, vocabulary, (case.rows, case.length))
    trained = (False,) * (case.length - case.trained) + (True,) * case.trained
    return collate([Example(tuple(row.tolist()), trained) for row in tokens], context)


def work(spec: dict[str, Any], gate: Gate) -> None:
    """A unit is a full training step of every case, forth and then back; at the end what the loss alone
    takes.
    """
    from mlx_posttrain.engines.base import AdamW
    from mlx_posttrain.methods import sft

    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]))
    trainer = engine.trainer(model, AdamW())
    known = [(case, batch(case, model.config["vocab_size"], model.context)) for case in cases(model.context)]
    while gate.open():
        seconds: list[list[float]] = [[] for _ in known]
        loss = 0.0
        for i in (*range(len(known)), *reversed(range(len(known)))):
            begun = time.perf_counter()
            loss = trainer.step(sft.loss, [known[i][1]], learning_rate("sft"))["loss"]
            engine.synchronize()
            seconds[i].append(time.perf_counter() - begun)
        tokens = 2 * sum(case.rows * case.trained for case, _ in known)
        found = [{**case._asdict(), "seconds": s} for (case, _), s in zip(known, seconds, strict=True)]
        gate.report(loss=loss, rows=2 * sum(case.rows for case, _ in known), tokens=tokens, cases=found)
    del model, trainer
    peaks = [
        {"positions": n, "vocabulary": v, "mb": loss_peak(engine.name, n, v), "logits_mb": 4 * n * v / MB}
        for v in VOCABULARIES
        for n in POSITIONS
    ]
    gate.close(device=engine.device(), loss=peaks)


def loss_peak(engine: str, positions: int, vocabulary: int) -> float:
    """MB that a loss and its gradient take at their peak beside hidden states, a trained head, and the
    gradients of both.
    """
    rng = np.random.default_rng(0)
    h, w = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (positions, vocabulary))
    target = rng.integers(0, vocabulary, positions)
    taken = _mlx_peak(h, w, target) if engine == "mlx" else _torch_peak(h, w, target)
    return (taken - h.nbytes - w.nbytes) / MB


def _mlx_peak(h: np.ndarray, w: np.ndarray, target: np.ndarray) -> int:
    import mlx.core as mx

    from mlx_posttrain.engines.mlx import fused as mlx_fused

    targets = mx.array(target.astype(np.int32))

    def loss(h: mx.array, w: mx.array) -> mx.array:
        return -mx.sum(mlx_fused.logprobs(h, w, targets, trained=True, training=True))

    given = mx.array(h), mx.array(w)
    mx.eval(given, targets)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))(*given))
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


def lines(engine: str, found: Mapping[str, Any]) -> list[str]:
    """What was found on one engine, in Markdown. found: ``cases`` with the seconds of all units, and
    ``loss``.
    """
    seconds = {Case(c["rows"], c["length"], c["trained"]): c["seconds"] for c in found["cases"]}
    middle = {case: statistics.median(s) for case, s in seconds.items()}
    text = [
        f"| {engine}: rows x length | trained tokens | seconds a step | microseconds a token read |",
        "|---|---|---|---|",
    ]
    for case, s in seconds.items():
        spread = f"{middle[case]:.4f} [{min(s):.4f}, {max(s):.4f}]"
        read = case.rows * case.length
        text.append(
            f"| {case.rows} x {case.length} | {case.rows * case.trained} | {spread} | "
            f"{1e6 * middle[case] / read:.0f} |"
        )
    text += ["", f"- {_rows(middle)}", f"- {_trained(middle)}", f"- {_lengths(middle)}", ""]
    text += [f"| {engine}: positions | vocabulary | MB of the loss | MB of all logits |", "|---|---|---|---|"]
    return text + [
        f"| {p['positions']} | {p['vocabulary']} | {p['mb']:.0f} | {p['logits_mb']:.0f} |"
        for p in found["loss"]
    ]


def _rows(middle: Mapping[Case, float]) -> str:
    first, last = ROWS[0], ROWS[-1]
    return f"{last.rows / first.rows:.0f} times the rows: {middle[last] / middle[first]:.2f} times the time"


def _trained(middle: Mapping[Case, float]) -> str:
    few, some, all_ = TRAINED
    straight = middle[few] + (middle[all_] - middle[few]) * (some.trained - few.trained) / (
        all_.trained - few.trained
    )
    shares = (
        f"{few.trained / few.length:.2f}, {some.trained / some.length:.2f} and "
        f"{all_.trained / all_.length:.2f} of the tokens trained"
    )
    return (
        f"{shares}: {middle[few] / middle[all_]:.2f}, {middle[some] / middle[all_]:.2f} and 1 of the time "
        f"(on a straight line {straight / middle[all_]:.2f} in the middle)"
    )


def _lengths(middle: Mapping[Case, float]) -> str:
    known: Sequence[Case] = [case for case in LENGTHS if case in middle]
    first, last = known[0], known[-1]
    return (
        f"the same tokens in rows {last.length / first.length:.0f} times as long: "
        f"{middle[last] / middle[first]:.2f} times the time"
    )
