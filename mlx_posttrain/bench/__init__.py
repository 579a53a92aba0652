"""Engines, and other trainers, timed on the same work: `mlx-posttrain bench`.

Every engine works in a process of its own (worker.py) and all are open at once; they take turns, one unit of
work at a time in alternating order, so that whatever else the machine does falls on all of them. The first
unit is warm-up: it compiles. A ratio is the median of the ratios of units that were done beside each other,
with the smallest and the largest; it is left out where the work was not the same (comparison.py).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.comparison import Timing, compare, relations
from mlx_posttrain.bench.material import SIZES, Shape, model_folder, reward_folder, rows
from mlx_posttrain.console import say
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan

ENGINES = ("mlx-gpu", "mlx-cpu", "torch-cpu")
WHAT = ("sft", "lora", "kl", "kl-lora", "reward", "ppo", "generate", "generate-single", "scaling")


class _Worker:
    """The driver's end of a worker's pipe."""

    def __init__(self, spec: dict[str, Any]):
        command = [sys.executable, "-m", "mlx_posttrain.bench.worker", json.dumps(spec)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        said = self.log.read().strip().splitlines()
        return {"error": said[-1] if said else f"ended with exit code {self.process.wait()}"}

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said last tells why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def bench(
    model: str = "gpt2",
    what: Sequence[str] = ("sft", "lora", "kl", "generate"),
    engines: Sequence[str] | None = None,
    *,
    peers: bool = False,
    units: int = 3,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Time ``engines`` (by default all that are here) at each kind of work; returns timings, this machine's
    peaks, and its description.

    peers: also other trainers that are installed, each beside the engine of ours on its library and device.
    units: timed units after the warm-up; a unit is a pass over the rows, one PPO iteration, one batch of
    answers, or of ``scaling`` two steps of every case. Raises UserError for an unknown kind of work or
    engine, for a model that cannot be had, and for rows that it does not read; an engine that fails is a line
    of the result, unless none has finished anything, which is a UserError too.
    """
    shape = shape or Shape()
    engines = list(engines or here())
    for key, names, known in (("--what", what, WHAT), ("--engines", engines, ENGINES)):
        if not names or any(name not in known or names.count(name) > 1 for name in names):
            raise UserError(
                f"{key} {','.join(names)!r}: give one or more of {', '.join(known)}, once each, "
                "with commas between"
            )
    if peers and shape.rows % shape.batch_size:
        raise UserError(
            f"--rows {shape.rows} is no multiple of --batch-size {shape.batch_size}: a peer "
            "would leave the rest out"
        )
    if "reward" in what and shape.rows % 2:
        raise UserError(
            f"--rows {shape.rows}: a reward model is trained on pairs of rows, so give an even number"
        )
    if "ppo" in what and 32 % shape.batch_size:
        raise UserError(
            f"--batch-size {shape.batch_size}: an iteration of ppo has 32 answers; give a "
            "number that divides them"
        )
    from mlx_posttrain.bench import peers as others

    extra = others.beside(engines) if peers else {}
    if peers and not extra:
        raise UserError(
            f"--peers: none of {', '.join(others.PEERS)} is installed that runs on {', '.join(engines)}"
        )
    timings: list[Timing] = []
    scaled: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlx-posttrain-bench-") as scratch:
        folder = model_folder(model, Path(scratch))
        of = plan.size(folder)
        _check_context(model, of, what, shape)
        machine, peaks = describe(), {name: measure_peaks(name) for name in engines}
        spec: dict[str, Any] = {"folder": str(folder), "shape": asdict(shape)}
        if "ppo" in what:
            spec["reward"] = str(reward_folder(folder, Path(scratch)))
        for kind in what:
            if kind == "scaling":
                scaled = {name: _scaling({**spec, "engine": name, "what": kind}, units) for name in engines}
                continue
            against: dict[str, str | None] = {
                name: engines[0] if name != engines[0] else None for name in engines
            }
            against |= {
                name: ours for name, ours in extra.items() if kind in others.PEERS[others.peer(name)].can
            }
            given = [
                {**spec, "engine": name, "what": kind, "against": base, "peers": bool(extra)}
                for name, base in against.items()
            ]
            found = _take_turns(given, units)
            compare(found)
            for t in found:
                if t.error is None and t.engine in peaks:
                    _shares(t, of, shape, peaks[t.engine])
            timings += found
    failed = [t.error for t in timings] + [found.get("error") for found in scaled.values()]
    if all(failed):
        raise UserError(f"no engine finished: {failed[0]}")
    return {
        "model": f"{model}, random weights" if model in SIZES else model,
        "shape": asdict(shape),
        "units": units,
        "machine": machine,
        "peaks": peaks,
        "timings": [asdict(t) for t in timings],
        "relations": relations(timings),
        "scaling": scaled,
    }


def _check_context(model: str, of: plan.Size, what: Sequence[str], shape: Shape) -> None:
    """Raise UserError for rows, or prompts with their answers, that the model does not read; of scaling's
    longer cases such are left out.
    """
    from mlx_posttrain.bench.scaling import ROWS
    from mlx_posttrain.bench.worker import ROLLOUT, prompts

    asked = max(map(len, prompts(of.vocabulary))) + ROLLOUT["max_tokens"]
    longest = max(len(e.tokens) for e in rows(shape, of.vocabulary))
    # whatever --length says
    own = {"scaling": ROWS[0].length, "ppo": asked, "generate": asked, "generate-single": asked}
    for kind in what:
        tokens = own.get(kind, longest)
        if of.context is not None and tokens > of.context:
            hint = "leave it out of --what" if kind in own else "give a shorter --length"
            raise UserError(
                f"{kind} takes rows of {tokens} tokens, and {model} reads {of.context} at most: {hint}"
            )


def here() -> list[str]:
    """The engines that this machine can run."""
    from mlx_posttrain import engines

    found = []
    if "mlx" in engines.available():
        import mlx.core as mx

        found = ["mlx-gpu"] if mx.is_available(mx.Device(mx.gpu)) else ["mlx-cpu"]
    return found + (["torch-cpu"] if "torch" in engines.available() else [])


def _take_turns(specs: Sequence[dict[str, Any]], units: int) -> list[Timing]:
    timings = [Timing(spec["engine"], spec["what"], spec.get("against")) for spec in specs]
    workers = [_Worker(spec) for spec in specs]
    try:
        for t, w in zip(timings, workers, strict=True):
            t.error = w.hear().get("error")
        for unit in range(units + 1):
            pairs = list(zip(timings, workers, strict=True))
            for t, w in pairs if unit % 2 else reversed(pairs):
                if t.error is not None:
                    continue
                heard = w.ask("go")
                t.error = heard.get("error")
                if t.error is None and unit:
                    t.seconds.append(heard["seconds"])
                    t.losses.append(heard["loss"])
                    t.rows, t.tokens, t.steps = heard["rows"], heard["tokens"], heard.get("steps")
                    say(f"{t.what} {t.engine}, unit {unit} of {units}: {heard['seconds']:.2f} s")
        for t, w in zip(timings, workers, strict=True):
            if t.error is None:
                heard = w.ask("end")
                t.error = heard.get("error")
                if t.error is not None:
                    continue
                t.peak_gb, t.process_gb, t.device = heard["peak_gb"], heard["process_gb"], heard["device"]
                t.shapes, t.version, t.first = (
                    heard.get("shapes"),
                    heard.get("version", ""),
                    heard.get("first", {}),
                )
    finally:
        for w in workers:
            w.end()
    return timings


def _scaling(spec: dict[str, Any], units: int) -> dict[str, Any]:
    """Seconds of every case in all units after the warm-up, and the memory of the loss (scaling.py);
    ``error`` where the engine failed.
    """
    worker = _Worker(spec)
    try:
        heard = worker.hear()
        cases: list[dict[str, Any]] = []
        for unit in range(units + 1):
            heard = heard if "error" in heard else worker.ask("go")
            if "error" not in heard and unit:
                cases += heard["cases"]
                say(f"scaling {spec['engine']}, unit {unit} of {units}: {heard['seconds']:.2f} s")
        heard = heard if "error" in heard else worker.ask("end")
    finally:
        worker.end()
    if "error" in heard:
        return {"error": heard["error"]}
    seconds: dict[tuple[int, int, int], list[float]] = {}
    for c in cases:
        seconds.setdefault((c["rows"], c["length"], c["trained"]), []).extend(c["seconds"])
    found = [{"rows": r, "length": n, "trained": t, "seconds": s} for (r, n, t), s in seconds.items()]
    return {"cases": found, "loss": heard["loss"]}


def _shares(t: Timing, of: plan.Size, shape: Shape, peaks: dict[str, float]) -> None:
    """What part of the machine's own peaks the useful work took: products for training, reading the weights
    for decoding.
    """
    from mlx_posttrain.bench.work import decode_bytes, ppo_flops, training_flops

    seconds = statistics.median(t.seconds)
    if t.what.startswith("generate"):
        t.bandwidth_share = (
            decode_bytes(of, 1 if t.what == "generate" else int(t.rows)) / seconds / 1e9 / peaks["gb_per_s"]
        )
    else:
        flops = ppo_flops(of) if t.what == "ppo" else training_flops(of, t.what, shape)
        t.flops_share = flops / seconds / 1e9 / peaks["gflops"]


def measure_peaks(engine: str) -> dict[str, float]:
    """This machine's own peaks on an engine's device: ``gflops`` of float32 products, ``gb_per_s`` read by a
    sum, in a process of its own.
    """
    code = f"import json; from mlx_posttrain.bench.work import peaks; print(json.dumps(peaks({engine!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise UserError(f"--engines {engine}: {said.rpartition(': ')[2]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe() -> dict[str, str]:
    """Chip, memory and versions, for whoever reads the figures elsewhere."""
    from mlx_posttrain import doctor

    wanted = (
        "system",
        "chip",
        "Python",
        "memory",
        "mlx-posttrain",
        "mlx",
        "mlx-lm",
        "torch",
        "peft",
        "transformers",
        "MLX's BLAS",
    )
    found = {c.name: c.value for c in doctor.collect() if c.name in wanted}
    found["Python"] = found.get("Python", "").split(" (")[0]
    found["memory"] = found.get("memory", "").split(",")[0]
    return found
