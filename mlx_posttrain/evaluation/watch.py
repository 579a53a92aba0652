"""A report of logs alone, written once or again and again while its runs go on.

No model is loaded, so that watching takes nothing from the training beside it: a page is made anew only when
a run's records have changed, and after a rest of twenty times as long as making it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.console import log
from mlx_posttrain.convert.files import home
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import charts, report
from mlx_posttrain.evaluation import findings as kinds
from mlx_posttrain.evaluation.findings.training import smooth
from mlx_posttrain.evaluation.suite import model_labels
from mlx_posttrain.runs import lock

SECONDS = 5  # between two looks at the runs, and between two reloads of the page
REST = 20  # times as long as making the page takes: at most a twentieth of a core
WATCHED = ("metrics.jsonl", "samples.jsonl", "report.json", "result.json")


def write(path: Path, names: Sequence[str]) -> Path:
    """Write the page of logs as they are. Raises UserError for a name that is no run."""
    labels = _labels(names)
    logs = {label: runs.reopen(name)[0].metrics() for name, label in zip(names, labels, strict=True)}
    curve = kinds.overfitting(logs)
    return report.write(path, names, labels, None, [curve] if curve else [])


def watch(path: Path, names: Sequence[str]) -> None:
    """Write the page at every change of a run's records until no run goes on, or until Ctrl-C.

    The page loads itself again meanwhile; the last one is left to ``write``. Raises UserError for a name that
    is no run, and for a pipeline.
    """
    folders = [_folder(name) for name in names]
    log(f"{path}: written anew while {', '.join(map(str, names))} goes on; Ctrl-C ends")
    seen: list[tuple[int, int] | None] = []
    rest = float(SECONDS)
    try:
        while any(_goes_on(folder) for folder in folders):
            if (now := _state(folders)) != seen:
                begun, seen = perf_counter(), now
                _write_live(path, names)
                rest = max(SECONDS, REST * (perf_counter() - begun))
            sleep(rest)
    except KeyboardInterrupt:
        log(f"{path}: no longer written anew; the run goes on")
        return
    for folder in folders:
        if runs.Run(folder).finished:
            log(f"{folder} is finished")
        else:
            log(f"{folder} is unfinished and no process writes it: `mlx-posttrain run --resume {folder}`")


def _write_live(path: Path, names: Sequence[str]) -> None:
    labels = _labels(names)
    losses: dict[str, charts.Curve] = {}
    held_out: dict[str, charts.Curve] = {}
    states = []
    for name, label in zip(names, labels, strict=True):
        run, recipe = runs.reopen(name)
        records = run.metrics()
        loss = [(r["step"], r["loss"]) for r in records if "loss" in r]
        tests = [(r["step"], r["eval/loss"]) for r in records if "eval/loss" in r]
        for points, drawn in ((smooth(loss) if loss else [], losses), (tests, held_out)):
            if points:
                drawn[label] = ([step for step, _ in points], [value for _, value in points])
        states.append(f"{label}: {_progress(records, recipe)}")
    states.append(f"written {datetime.now():%H:%M:%S}, and again at every change")
    curve = charts.curves(losses, points=held_out, x="step", y="loss", title="Loss") if losses else None
    live = report.Live(SECONDS, states, {"curves": curve} if curve else {})
    report.write(path, names, labels, None, [], live)


def _progress(records: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> str:
    """How far a run is, by its records."""
    train = recipe.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    told = f"step {records[-1]['step'] if records else 0}" + (f" of {steps}" if steps else "")
    for key, what in (("loss", "loss"), ("eval/loss", "held-out loss")):
        if found := [r[key] for r in records if key in r]:
            told += f", {what} {found[-1]:.4g}"
    return told


def _labels(names: Sequence[str]) -> list[str]:
    labels = model_labels(names)
    charts.SERIES_ORDER.set(tuple(labels))
    return labels


def _folder(name: str) -> Path:
    run, recipe = runs.reopen(name)
    if "stages" in recipe:
        raise UserError(
            f"{name} is a pipeline: watch its stages, of which there are "
            f"{', '.join(str(home(name) / stage) for stage in recipe['stages'])}"
        )
    return run.folder


def _goes_on(folder: Path) -> bool:
    """Whether a process writes the run."""
    try:
        lock.check(folder)
    except lock.RunInUse:
        return True
    return False


def _state(folders: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Time and size of every file that the page is made from."""
    found: list[tuple[int, int] | None] = []
    for path in (folder / name for folder in folders for name in WATCHED):
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found
