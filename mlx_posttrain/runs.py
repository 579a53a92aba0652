"""A run directory: everything that happened, and everything needed to go on.

recipe.yaml      the resolved recipe with versions and machine
metrics.jsonl    one line per step or evaluation
samples.jsonl    texts written during training
checkpoints/     step-N/ (trained weights, optimizer, random state, position); best-N/ (weights with the best evaluation)
final/           a transformers model folder or a PEFT adapter folder
card.md          what was done, for people
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlx_posttrain.convert.files import write_atomically
from mlx_posttrain.errors import UserError
from mlx_posttrain.recipe import Recipe


class Run:
    """Handle on a run directory; create one with :func:`start` or :func:`reopen`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"

    # what happened

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl. Floats are written in full so that runs can be compared exactly."""
        self._append("metrics.jsonl", record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append one record to samples.jsonl."""
        self._append("samples.jsonl", record)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl."""
        return read_jsonl(self.folder / "metrics.jsonl")

    def write_recipe(self, recipe: Recipe, **facts: Any) -> None:
        """Write the resolved recipe with the versions and machine it runs on, and ``facts`` that became known since."""
        environment = {"environment": environment_info(), **facts}
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.folder / "recipe.yaml", text + "\n" + yaml.safe_dump(environment, sort_keys=False))

    # checkpoints

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], state: Mapping[str, Any], arrays: Mapping[str, np.ndarray], keep: int
    ) -> Path:
        """Write ``checkpoints/step-N`` completely or not at all, then delete all but the newest ``keep``.

        ``write(folder)`` writes weights and optimizer; ``state`` is JSON (position, best loss); ``arrays`` are random states.
        Raises UserError when the disk is full, leaving earlier checkpoints alone.
        """
        target = self.checkpoints / f"step-{step:06d}"

        def fill(folder: Path) -> None:
            write(folder)
            np.savez(folder / "random.npz", allow_pickle=False, **arrays)  # type: ignore[arg-type]
            (folder / "state.json").write_text(json.dumps({"step": step, **state}))

        replace_folder(target, fill)
        for old in self.list_checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        # An older best may still be what the newest checkpoint knows; only then is it safe to drop the others.
        for old in self.checkpoints.glob("best-*"):
            if old.name != state.get("best"):
                shutil.rmtree(old, ignore_errors=True)
        return target

    def save_best(self, step: int, write: Callable[[Path], None]) -> str:
        """Write the weights with the best evaluation so far to ``checkpoints/best-N``; returns that name."""
        name = f"best-{step:06d}"
        replace_folder(self.checkpoints / name, write)
        return name

    def list_checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(p for p in self.checkpoints.glob("step-*") if (p / "state.json").is_file())

    def truncate_logs(self, step: int) -> None:
        """Drop records of steps after ``step``: a resumed run writes them again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if path.is_file():
                kept = [r for r in read_jsonl(path) if r.get("step", 0) <= step]
                write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    @property
    def finished(self) -> bool:
        """Whether ``final/`` has been written."""
        return self.final.is_dir()


def start(folder: str | Path, recipe: Recipe) -> Run:
    """Create a run directory. Raises UserError when the folder holds anything: a run never overwrites another."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / "recipe.yaml").is_file():
            state = "a finished run" if (folder / "final").is_dir() else "an unfinished run"
            hint = "" if (folder / "final").is_dir() else f"continue it with --resume {folder}, or "
            raise UserError(f"{folder} holds {state}: {hint}choose another folder with output=DIR, or delete it")
        raise UserError(f"{folder} exists and is not empty: choose another folder with output=DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {folder} cannot be created: {error.strerror}") from None
    run = Run(folder)
    run.write_recipe(recipe)
    return run


def reopen(folder: str | Path) -> tuple[Run, dict[str, Any]]:
    """An existing run and its recipe as a mapping, for ``--resume`` and evaluation. Raises UserError if it is not a run."""
    from mlx_posttrain.recipe import read_yaml

    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run directory: it has no recipe.yaml")
    raw = read_yaml(folder / "recipe.yaml")
    raw.pop("environment", None)
    return Run(folder), raw


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` is a run directory."""
    return (Path(folder) / "recipe.yaml").is_file()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8") and None)


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then rename it to ``target``: a crash never leaves half of one.

    An existing ``target`` (the same step written again after a resume) is removed first. Raises UserError on a full disk.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except Exception as error:  # mlx and safetensors have errors of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError) and "rite" not in str(error) and "I/O" not in str(error):
            raise
        free = shutil.disk_usage(target.parent).free / 2**30 if target.parent.is_dir() else 0.0
        raise UserError(
            f"{target} cannot be written ({getattr(error, 'strerror', None) or error}; {free:.1f} GB free): make room, then continue with --resume"
        ) from None


def environment_info() -> dict[str, Any]:
    """Versions and machine, for recipe.yaml and reports."""
    versions = {}
    for package in ("mlx-posttrain", "mlx", "mlx-lm", "torch", "transformers", "peft", "numpy", "datasets"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
    }
