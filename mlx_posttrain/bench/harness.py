"""What all kinds of timed work share: the pipe to the benchmark, opening an engine, and fixed settings."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from mlx_posttrain.bench.inputs import Shape, rows
from mlx_posttrain.engines.process import process_peak
from mlx_posttrain.errors import UserError

#: Sizes of the rollouts that are decoded: prompts, samples per prompt, and tokens per sample.
ROLLOUT = {"prompts": 4, "samples": 8, "max_tokens": 64}


def learning_rate(adapter: bool) -> float:
    """Learning rate of a kind of work.

    It is small enough for losses to stay comparable and large enough for a few steps to change them. An
    adapter starts at zero and needs a larger one.
    """
    return 3e-4 if adapter else 1e-5


def prompts(vocabulary: int, length: int | None = None) -> list[list[int]]:
    """Prompts to decode from: the prompt tokens of the first ``ROLLOUT["prompts"]`` rows.

    length: tokens of each; where given, they are whole rows of it.
    """
    found = rows(Shape(rows=ROLLOUT["prompts"], length=length), vocabulary)
    return [list(e.tokens if length else e.tokens[: e.answer_start]) for e in found]


def characters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing: the number of characters of each answer."""
    return [float(len(text)) for text in completions]


class Gate:
    """The worker's end of the pipe to the benchmark.

    ``open`` waits for the next unit and starts the clock, ``report`` stops it. peak: a function that returns
    the library's peak memory in GB; without one the peak of the process is reported.
    """

    def __init__(self, peak: Callable[[], float] | None = None):
        self.peak = peak
        self._out = sys.stdout
        sys.stdout = sys.stderr  # what libraries print must not mix with the records
        self._sent_ready = False
        self._seconds: float | None = None

    def open(self) -> bool:
        """Wait for the next unit; False when there is none."""
        if not self._sent_ready:
            self._send(ready=True)
            self._sent_ready = True
        go = sys.stdin.readline().strip() == "go"
        self._begun, self._seconds = time.perf_counter(), None
        return go

    def stop(self) -> None:
        """Stop the clock early, before the unit's stats are computed."""
        self._seconds = time.perf_counter() - self._begun

    def report(self, **stats: Any) -> None:
        """Send the unit's seconds and stats; everything it computed must be done."""
        if self._seconds is None:
            self.stop()
        self._send(seconds=self._seconds, **stats)

    def close(self, **stats: Any) -> None:
        """Send the memory used by all units, and stats.

        ``peak_gb`` is the library's own count, ``process_gb`` the peak of the whole process.
        """
        process = process_peak() / 2**30
        self._send(peak_gb=self.peak() if self.peak else process, process_gb=process, **stats)

    def fail(self, error: Exception) -> None:
        """Send what went wrong, in one line."""
        first = (str(error).splitlines() or [""])[0]
        self._send(error=first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")

    def _send(self, **record: Any) -> None:
        print(json.dumps(record), file=self._out, flush=True)


def use_device(name: str) -> None:
    """Make MLX compute on the device of ``mlx-gpu`` or ``mlx-cpu``.

    Raises UserError where this machine does not have it.
    """
    import mlx.core as mx

    device = mx.Device(mx.gpu if name == "mlx-gpu" else mx.cpu)
    if not mx.is_available(device):
        raise UserError(f"{name}: this machine has no such device")
    mx.set_default_device(device)


def open_engine(name: str) -> Any:
    """The engine called ``mlx-gpu``, ``mlx-cpu`` or ``torch-cpu``.

    Raises UserError where its library or its device is missing.
    """
    from mlx_posttrain import engines

    engine = engines.get(name.partition("-")[0])
    if engine.name == "mlx":
        use_device(name)
    return engine
