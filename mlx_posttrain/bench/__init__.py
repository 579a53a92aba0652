"""Time engines, and other trainers, on the same work: `mlx-posttrain bench`.

Every engine runs in its own process (worker.py). All processes are open at once and take turns, one unit of
work at a time in alternating order, so that other load on the machine affects all of them alike. A unit is
as many passes over the work as the fastest engine needs for two seconds, after one that warms up where
passes are short: engines compile in their first, and a GPU's clocks fall while the others have their turns. A
ratio is the median of the ratios of units timed next to each other, given with the smallest and the largest;
there is none where the work differed (comparison.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.baselines import BASELINES, baseline_name, installed, missing
from mlx_posttrain.bench.comparison import Timing, compare, relative_costs
from mlx_posttrain.bench.flops import decode_bytes, rollout_flops, training_flops
from mlx_posttrain.bench.harness import ROLLOUT, prompts
from mlx_posttrain.bench.inputs import SIZES, Shape, model_folder, reward_folder, rows
from mlx_posttrain.bench.kinds import kind_names, on_rollouts, training_kinds
from mlx_posttrain.bench.scaling import ROWS as SCALING_ROWS
from mlx_posttrain.console import log
from mlx_posttrain.engines.precision import check_dtype
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan

ENGINES = ("mlx-gpu", "mlx-cpu", "torch-cpu")
#: Seconds that a unit takes at least, on the fastest engine.
UNIT_SECONDS = 2.0
#: Seconds of a pass on every engine beside which those of compiling and of rising clocks are few: one such
#: pass warms up, and no turn begins with another.
LONG_PASS = 20.0


class _Worker:
    """The benchmark's end of the pipe to a worker."""

    def __init__(self, spec: dict[str, Any]):
        command = [sys.executable, "-m", "mlx_posttrain.bench.worker", json.dumps(spec)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def receive(self) -> dict[str, Any]:
        """The worker's next record, or ``error`` with the last line it logged where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        logged = self.log.read().strip().splitlines()
        return {"error": logged[-1] if logged else f"ended with exit code {self.process.wait()}"}

    def send(self, command: str) -> dict[str, Any]:
        """Send a command and return the worker's answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: its last record or log line says why
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.receive()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def bench(
    model: str = "gpt2",
    what: Sequence[str] = ("sft", "lora", "kl", "generate"),
    engines: Sequence[str] | None = None,
    *,
    baselines: bool = False,
    units: int = 3,
    shape: Shape | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time engines at each kind of work; returns timings, the machine's peaks and its description.

    what: kinds of work, see kinds.py; where one of them trains on pairs, the rows of all are pairs. engines:
    of ``ENGINES``, by default all that this machine can run. baselines: also time other trainers that are
    installed, each against our engine on the same library and device. units: timed units; a pass of one is
    over the rows, an iteration on rollouts, or a batch of answers; a unit of ``scaling`` is two steps of
    every case. dtype: of the weights that are not trained. Raises UserError for an unknown kind of work,
    engine or number format, for a model that cannot be found, and for rows longer than it reads. An engine
    that fails is reported in its timing; where none finished anything, that is a UserError too.
    """
    shape = shape or Shape()
    engines = list(engines or available_engines())
    for key, names, known in (("--what", what, kind_names()), ("--engines", engines, ENGINES)):
        if not names or any(name not in known or names.count(name) > 1 for name in names):
            raise UserError(
                f"{key} {','.join(names)!r}: give one or more of {', '.join(known)}, once each, "
                "separated by commas"
            )
    if baselines and shape.rows % shape.batch_size:
        raise UserError(
            f"--rows {shape.rows} is no multiple of --batch-size {shape.batch_size}: other trainers "
            "would drop the remaining rows"
        )
    training = {name: kind for name, kind in training_kinds().items() if name in what}
    if check_dtype(dtype) != "float32":
        adapted = {name for name, kind in training.items() if kind.adapter}
        whole = [name for name in what if name not in adapted and not name.startswith("generate")]
        if whole:
            raise UserError(
                f"--dtype {dtype}: {', '.join(whole)} trains all weights, in float32; leave it out of --what"
            )
        if baselines:
            raise UserError(f"--dtype {dtype}: other trainers are timed in float32; leave out --peers")
    for name, kind in training.items():
        if kind.rows_per_item == 2 and shape.rows % 2:
            raise UserError(
                f"--rows {shape.rows}: {name} is trained on pairs of rows, so give an even number"
            )
        if kind.on_rollouts and 32 % shape.batch_size:
            raise UserError(
                f"--batch-size {shape.batch_size}: an iteration of {name} has 32 answers; give a "
                "number that divides 32"
            )
    shape = replace(shape, paired=any(kind.rows_per_item == 2 for kind in training.values()))
    extra = installed(engines, what) if baselines else {}
    if baselines:
        absent = missing(engines, what)
        if not extra:
            raise UserError(
                f"--peers: no other trainer that does {', '.join(what)} is installed and runs on "
                f"{', '.join(engines)}" + "".join(f"; {line}" for line in absent)
            )
        for line in absent:
            log(f"--peers: {line}")
    timings: list[Timing] = []
    scaled: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlx-posttrain-bench-") as scratch:
        folder = model_folder(model, Path(scratch))
        size = plan.size(folder)
        _check_context(model, size, what, shape)
        machine, peaks = describe_machine(), {name: measure_peaks(name) for name in engines}
        spec: dict[str, Any] = {"folder": str(folder), "shape": asdict(shape), "dtype": dtype}
        if any(kind.on_rollouts and kind.scored_by_model for kind in training.values()):
            spec["reward"] = str(reward_folder(folder, Path(scratch)))
        for kind in what:
            if kind == "scaling":
                scaled = {
                    name: _time_scaling({**spec, "engine": name, "what": kind}, units) for name in engines
                }
                continue
            against: dict[str, str | None] = {
                name: engines[0] if name != engines[0] else None for name in engines
            }
            against |= {
                name: ours for name, ours in extra.items() if kind in BASELINES[baseline_name(name)].kinds
            }
            specs = [
                {**spec, "engine": name, "what": kind, "against": base, "baselines": bool(extra)}
                for name, base in against.items()
            ]
            timed = _take_turns(specs, units)
            compare(timed)
            timings += timed
        _add_peak_shares(timings, size, shape, peaks)
    errors = [t.error for t in timings] + [result.get("error") for result in scaled.values()]
    if all(errors):
        raise UserError(f"no engine finished: {errors[0]}")
    return {
        "model": f"{model}, random weights" if model in SIZES else model,
        "shape": asdict(shape),
        "units": units,
        "dtype": dtype,
        "machine": machine,
        "peaks": peaks,
        "timings": [asdict(t) for t in timings],
        "relations": relative_costs(timings),
        "scaling": scaled,
    }


def _check_context(model: str, size: plan.Size, what: Sequence[str], shape: Shape) -> None:
    """Raise UserError where rows, or prompts with their answers, are longer than the model's context.

    The longer cases of scaling are not checked, because those that do not fit are left out.
    """
    decoded = max(map(len, prompts(size.vocabulary, shape.length))) + ROLLOUT["max_tokens"]
    longest = max(len(e.tokens) for e in rows(shape, size.vocabulary))
    # kinds of work whose rows are not of --length
    fixed = {"scaling": SCALING_ROWS[0].length, "generate": decoded, "generate-single": decoded}
    fixed |= {name: decoded for name in what if on_rollouts(name)}
    for kind in what:
        tokens = fixed.get(kind, longest)
        if size.context is not None and tokens > size.context:
            hint = "leave it out of --what" if kind in fixed else "give a shorter --length"
            raise UserError(
                f"{kind} takes rows of {tokens} tokens, and {model} reads {size.context} at most: {hint}"
            )


def available_engines() -> list[str]:
    """The engines that this machine can run."""
    from mlx_posttrain import engines

    names = []
    if "mlx" in engines.available():
        import mlx.core as mx

        names = ["mlx-gpu", "mlx-cpu"] if mx.is_available(mx.Device(mx.gpu)) else ["mlx-cpu"]
    return names + (["torch-cpu"] if "torch" in engines.available() else [])


def _take_turns(specs: Sequence[dict[str, Any]], units: int) -> list[Timing]:
    """Time one kind of work on several engines, one unit each in turn, in alternating order.

    All have units of as many passes, so that they train alike.
    """
    timings = [
        Timing(spec["engine"], spec["what"], spec.get("against"), dtype=spec.get("dtype", "float32"))
        for spec in specs
    ]
    workers = [_Worker(spec) for spec in specs]
    try:
        for t, w in zip(timings, workers, strict=True):
            t.error = w.receive().get("error")
        pairs = list(zip(timings, workers, strict=True))
        quickest = _warm_up(pairs)
        again = int(quickest < LONG_PASS)
        quickest = _warm_up(pairs) if again else quickest
        passes = max(1, math.ceil(UNIT_SECONDS / max(quickest, 1e-6)))
        for unit in range(1, units + 1):
            for t, w in pairs if unit % 2 else reversed(pairs):
                records = _passes(t, w, again + passes)[again:]
                if t.error is None:
                    _add_unit(t, records)
                    log(f"{t.what} {t.engine}, unit {unit} of {units}: {t.seconds[-1]:.2f} s")
        for t, w in zip(timings, workers, strict=True):
            if t.error is None:
                record = w.send("end")
                t.error = record.get("error")
                if t.error is not None:
                    continue
                t.peak_gb, t.process_gb, t.device = record["peak_gb"], record["process_gb"], record["device"]
                t.shapes, t.version, t.first, t.planned_gb = (
                    record.get("shapes"),
                    record.get("version", ""),
                    record.get("first", {}),
                    record.get("planned_gb"),
                )
    finally:
        for w in workers:
            w.kill()
    return timings


def _warm_up(pairs: Sequence[tuple[Timing, _Worker]]) -> float:
    """Seconds of the quickest of a pass of each worker."""
    quickest = float("inf")
    for t, w in pairs:
        for record in _passes(t, w, 1):
            log(f"{t.what} {t.engine}, warm-up: {record['seconds']:.2f} s")
            quickest = min(quickest, record["seconds"])
    return quickest


def _passes(t: Timing, worker: _Worker, number: int) -> list[dict[str, Any]]:
    """The records of passes of a worker that works; its first failure is noted in its timing."""
    records: list[dict[str, Any]] = []
    while t.error is None and len(records) < number:
        records.append(worker.send("go"))
        t.error = records[-1].get("error")
    return records if t.error is None else []


def _add_unit(t: Timing, records: Sequence[dict[str, Any]]) -> None:
    t.seconds.append(sum(record["seconds"] for record in records))
    t.losses.append(records[-1]["loss"])
    t.passes = len(records)
    t.rows, t.tokens = (sum(record[key] for record in records) for key in ("rows", "tokens"))
    t.steps = sum(record["steps"] for record in records) if "steps" in records[0] else None


def _time_scaling(spec: dict[str, Any], units: int) -> dict[str, Any]:
    """Seconds of every case of scaling.py in all units after the warm-up, and the memory of the loss.

    Returns ``error`` where the engine failed.
    """
    worker = _Worker(spec)
    try:
        record = worker.receive()
        cases: list[dict[str, Any]] = []
        for unit in range(units + 1):
            record = record if "error" in record else worker.send("go")
            if "error" not in record and unit:
                cases += record["cases"]
                log(f"scaling {spec['engine']}, unit {unit} of {units}: {record['seconds']:.2f} s")
        record = record if "error" in record else worker.send("end")
    finally:
        worker.kill()
    if "error" in record:
        return {"error": record["error"]}
    seconds: dict[tuple[int, int, int], list[float]] = {}
    for c in cases:
        seconds.setdefault((c["rows"], c["length"], c["trained"]), []).extend(c["seconds"])
    merged = [{"rows": r, "length": n, "trained": t, "seconds": s} for (r, n, t), s in seconds.items()]
    return {"cases": merged, "loss": record["loss"]}


def _add_peak_shares(
    timings: Sequence[Timing], size: plan.Size, shape: Shape, peaks: dict[str, dict[str, float]]
) -> None:
    """Fill in the share of the machine's peaks that the necessary work reached.

    That is arithmetic for training, and reading the weights for decoding. Work that is faster than what was
    measured as a peak becomes the peak.
    """
    rates: list[tuple[Timing, str, float]] = []
    for t in timings:
        if t.error is not None or t.engine not in peaks:
            continue
        if t.what.startswith("generate"):
            batches = t.passes if t.what == "generate" else int(t.rows)
            key, work = "gb_per_s", decode_bytes(size, batches, t.dtype)
        else:
            kind = training_kinds()[t.what]
            once = (rollout_flops if kind.on_rollouts else training_flops)(size, kind, shape)
            key, work = "gflops", t.passes * once
        rates.append((t, key, work / statistics.median(t.seconds) / 1e9))
    for t, key, rate in rates:
        peaks[t.engine][key] = max(peaks[t.engine][key], rate)
    for t, key, rate in rates:
        share = rate / peaks[t.engine][key]
        if key == "gflops":
            t.flops_share = share
        else:
            t.bandwidth_share = share


def measure_peaks(engine: str) -> dict[str, float]:
    """This machine's peaks on an engine's device, measured in a separate process.

    ``gflops`` is that of float32 matrix products, in GFLOP/s; ``gb_per_s`` that of reading memory for a sum,
    in GB/s. Raises UserError where the engine cannot be opened.
    """
    code = f"import json; from mlx_posttrain.bench.flops import peaks; print(json.dumps(peaks({engine!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        raise UserError(f"--engines {engine}: {last.rpartition(': ')[2]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe_machine() -> dict[str, str]:
    """Chip, memory and versions, for readers of the timings elsewhere."""
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
        "MLX devices",
        "temperature",
    )
    facts = {c.name: c.value for c in doctor.collect() if c.name in wanted}
    facts["Python"] = facts.get("Python", "").split(" (")[0]
    facts["memory"] = facts.get("memory", "").split(",")[0]
    return facts
