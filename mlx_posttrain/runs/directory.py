"""A run directory: everything that happened, and everything needed to resume.

recipe.yaml      the resolved recipe with versions and machine
metrics.jsonl    one line per step or evaluation
tensorboard/     the metrics as event files, where the recipe's ``log`` asks for them
wandb/           W&B's files, likewise
samples.jsonl    texts written during training
checkpoints/     step-N/ (trained weights, optimizer, random state, position);
                 best-N/ (weights with the best evaluation);
                 damaged-step-N/ (a broken checkpoint that a resume skipped)
final/           a transformers model folder or a PEFT adapter folder
card.md          what was done, for people
.lock            present while a process writes the run (lock.py)
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlx_posttrain import jsonl
from mlx_posttrain.config import Recipe, read_yaml
from mlx_posttrain.console import log
from mlx_posttrain.convert.files import drive_to_disk, home, to_disk, write_atomically
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs import lock
from mlx_posttrain.runs.checkpoints import (
    Checkpoint,
    Damaged,
    file_hashes,
    open_checkpoint,
    read_state,
    write_state,
)
from mlx_posttrain.runs.trackers import Tracker, close_all
from mlx_posttrain.yaml_text import MAX_OF_A_RUN

#: What whoever opens a run reads of its recipe, which its method need not know: (key, type, what that is).
_SHAPE: tuple[tuple[str, Any, str], ...] = (
    ("method", str, "text"),
    ("model", str, "text"),
    ("data", dict, "a section"),
    ("adapter", dict | None, "a section"),
    ("stages", dict, "a section"),
)

#: File of the reference's log-probabilities, computed before the first step.
REFERENCE = "reference.safetensors"


class Run:
    """Handle on a run directory, from :func:`create` or :func:`reopen`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"
        self.trackers: Sequence[Tracker] = ()
        #: kept in checkpoints, so that a resume notices another one
        self.recipe: dict[str, Any] | None = None
        self._best: dict[str, dict[str, list[Any]]] = {}
        self._release: Callable[[], object] = lambda: None

    def lock(self) -> None:
        """Keep other processes from writing here.

        Lasts until :meth:`close`, or until the object is garbage collected. Raises RunInUse if another
        process has the lock.
        """
        try:
            self._release = weakref.finalize(self, lock.acquire(self.folder))
        except OSError as error:
            raise _cannot_write(self.folder / lock.NAME, error) from None

    # Records

    def track(self, trackers: Sequence[Tracker]) -> None:
        """Pass every record to ``trackers`` too.

        Lasts until :meth:`close`, or until the run of a failed training is garbage collected.
        """
        self.trackers = trackers
        # A finalizer, so that a training loop may fail anywhere without having to close them. At the end of
        # the process the trackers' packages close themselves.
        weakref.finalize(self, close_all, trackers, finished=False).atexit = False

    def close(self) -> None:
        """Close the trackers of a finished run and release the lock."""
        close_all(self.trackers, finished=True)
        self._release()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl.

        Floats are written in full, so that runs can be compared exactly.
        """
        self._append("metrics.jsonl", record)
        try:
            for tracker in self.trackers:
                tracker.log(record)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append one record to samples.jsonl."""
        self._append("samples.jsonl", record)

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        path = self.folder / name
        try:
            jsonl.append(path, [record])
        except OSError as error:
            raise _cannot_write(path, error) from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl. Raises UserError for one that a run does not write."""
        path = self.folder / "metrics.jsonl"
        records = jsonl.read(path)
        for number, record in enumerate(records, 1):
            figures = [v for k, v in record.items() if k in ("step", "loss", "lr") or k.startswith("eval/")]
            if not isinstance(record.get("step"), int) or not all(
                isinstance(v, int | float) for v in figures
            ):
                raise UserError(f"{path}, record {number}: not one that a run writes; correct or delete it")
        return records

    def write_recipe(self, recipe: Recipe, **facts: Any) -> None:
        """Write recipe.yaml: the resolved recipe, the versions and machine it runs on, and ``facts``.

        ``facts`` became known only after the recipe was resolved.
        """
        environment = {"environment": environment_info(), **facts}
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(self.folder / "recipe.yaml", text + "\n" + yaml.safe_dump(environment, sort_keys=False))

    def note_changes(self, change: Mapping[str, Any]) -> None:
        """Add an entry to ``changes`` in recipe.yaml, unless it is there already."""
        raw = read_yaml(self.folder / "recipe.yaml", MAX_OF_A_RUN)
        noted = raw.get("changes")
        noted = noted if isinstance(noted, list) else []
        if change not in noted:
            raw["changes"] = [*noted, dict(change)]
            write_text(self.folder / "recipe.yaml", yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))

    # Checkpoints

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[Path], None],
        state: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        keep: int,
    ) -> Path:
        """Write ``checkpoints/step-N`` completely or not at all, then delete all but the newest ``keep``.

        ``write(folder)`` writes weights and optimizer; ``state`` is JSON (position, best loss); ``arrays``
        are random states. Raises UserError when the disk is full, leaving earlier checkpoints alone.
        """
        target = self.checkpoints / f"step-{step:06d}"

        def fill(folder: Path) -> None:
            write(folder)
            np.savez(folder / "random.npz", allow_pickle=False, **arrays)  # type: ignore[arg-type]
            files = self._hashes(folder, target.name)
            if state.get("best"):
                files |= self._hashes(self.checkpoints / state["best"], state["best"])
            write_state(folder, {"step": step, "recipe": self.recipe, **state, "files": files})
            # a resume relies on every record before the checkpoint
            for name in ("metrics.jsonl", "samples.jsonl"):
                if (self.folder / name).is_file():
                    to_disk(self.folder / name)

        replace_folder(target, fill)
        for old in self.list_checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        # A checkpoint without the best weights that it names cannot be resumed from.
        referenced = set()
        for kept in self.list_checkpoints():
            with contextlib.suppress(Damaged):
                referenced.add(read_state(kept).get("best"))
        for old in self.checkpoints.glob("best-*"):
            if old.name not in referenced:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def newest_checkpoint(self) -> Checkpoint | None:
        """Return the newest sound checkpoint, or None where none was ever written.

        Sound means: each of its files, and of the best weights that it names, has the SHA-256 that it was
        written with, of a checkpoint of earlier releases the size, and opens. Newer checkpoints that are
        damaged are renamed, and one printed line names them. Raises UserError where all of them are damaged.
        """
        for unfinished in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        damaged: dict[Path, Damaged] = {}
        newest = None
        for folder in reversed(self._step_folders()):
            try:
                newest = open_checkpoint(folder)
                break
            except Damaged as error:
                damaged[folder] = error
        if newest is None and damaged:
            what = "; ".join(f"{folder.name}: {error}" for folder, error in damaged.items())
            raise UserError(
                f"{self.checkpoints} has no sound checkpoint ({what}): put back a copy of one, start anew "
                f"with output=DIR, or delete {self.checkpoints} to train this run from step 0"
            )
        said = []
        for folder, error in damaged.items():
            renamed = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rename(renamed)
            said.append(f"{folder} is damaged ({error}) and was renamed to {renamed.name}")
        if newest is not None and said:
            log("; ".join(said) + f": resuming from {newest.folder.name}")
        return newest

    def newest_state(self) -> dict[str, Any]:
        """Return the state of the newest checkpoint that has a readable one, {} where there is none."""
        for folder in reversed(self._step_folders()):
            with contextlib.suppress(Damaged):
                return read_state(folder)
        return {}

    def _step_folders(self) -> list[Path]:
        # by length first: the millionth step has one more digit
        return sorted(self.checkpoints.glob("step-*"), key=lambda p: (len(p.name), p.name))

    def save_best(self, step: int, write: Callable[[Path], None]) -> str:
        """Write the weights with the best evaluation so far to ``checkpoints/best-N``; return that name."""
        name = f"best-{step:06d}"
        replace_folder(self.checkpoints / name, write)
        self._best = {name: file_hashes(self.checkpoints / name, name)}
        return name

    def _hashes(self, folder: Path, name: str) -> dict[str, list[Any]]:
        """:func:`file_hashes`; those of the best weights, which many checkpoints name, are computed once."""
        return self._best[name] if name in self._best else file_hashes(folder, name)

    def list_checkpoints(self) -> list[Path]:
        """Return the finished checkpoints, oldest first."""
        return [folder for folder in self._step_folders() if (folder / "state.json").is_file()]

    def truncate_logs(self, step: int) -> None:
        """Drop the records of steps after ``step``: a resumed run writes them again."""

        def earlier(record: dict[str, Any]) -> bool:
            of = record.get("step", 0)
            return not isinstance(of, int | float) or of <= step

        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            try:
                jsonl.keep(path, earlier)
            except OSError as error:
                raise _cannot_write(path, error) from None
        for tracker in self.trackers:
            tracker.rewind(step)

    @property
    def finished(self) -> bool:
        """Whether ``final/`` has been written."""
        return self.final.is_dir()

    def discard(self) -> None:
        """Remove a run in which nothing was trained, so that the next attempt finds the folder free.

        Other files in the folder stay.
        """
        for name in ("recipe.yaml", REFERENCE, lock.NAME):
            (self.folder / name).unlink(missing_ok=True)
        # the untrained model that pre-training makes
        shutil.rmtree(self.folder / "start", ignore_errors=True)
        self._release()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def create(folder: str | Path, recipe: Recipe) -> Run:
    """Create a run directory and lock it for this process.

    Raises UserError if the folder is not empty: a run never overwrites another.
    """
    folder = check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {folder} cannot be created: {error.strerror}") from None
    run = Run(folder)
    run.lock()
    run.write_recipe(recipe)
    return run


def check_free(folder: str | Path) -> Path:
    """The folder of a new run. Raises UserError if there is something in it."""
    folder = home(folder)
    if folder.exists() and (not folder.is_dir() or any(path.name != lock.NAME for path in folder.iterdir())):
        lock.check(folder)
        if (folder / "recipe.yaml").is_file():
            state = "a finished run" if (folder / "final").is_dir() else "an unfinished run"
            hint = "" if (folder / "final").is_dir() else f"continue it with --resume {folder}, or "
            raise UserError(
                f"{folder} holds {state}: {hint}choose another folder with output=DIR, or delete it"
            )
        raise UserError(f"{folder} exists and is not empty: choose another folder with output=DIR")
    return folder


def reopen(folder: str | Path, *, write: bool = False) -> tuple[Run, dict[str, Any]]:
    """Return an existing run and its recipe as a mapping.

    ``write`` locks the run, as ``--resume`` needs; reading alone does not. Raises UserError if the folder is
    not a run, and RunInUse if it is to be locked and another process has the lock.
    """
    from mlx_posttrain.key_names import present_names

    folder = home(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run directory: it has no recipe.yaml")
    run = Run(folder)
    if write:
        run.lock()
    raw = read_yaml(folder / "recipe.yaml", MAX_OF_A_RUN)
    raw.pop("environment", None)
    for key, kind, what in _SHAPE:
        if key in raw and not isinstance(raw[key], kind):
            raise UserError(
                f"{folder / 'recipe.yaml'}: '{key}' is {type(raw[key]).__name__}, not {what}: put it right"
            )
    return run, present_names(raw)


def is_run(folder: str | Path) -> bool:
    """Return whether ``folder`` is a run directory."""
    return (home(folder) / "recipe.yaml").is_file()


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises UserError on a full disk."""
    try:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise _cannot_write(path, error) from None


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then rename it to ``target``.

    So neither a crash nor a power cut leaves half of one. An existing ``target`` (the same step written again
    after a resume) is removed first. Raises UserError on a full disk.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        # Data before the name: file systems may write a rename earlier than the data of the renamed file.
        for folder, _, names in os.walk(temporary):
            for name in names:
                to_disk(Path(folder, name))
            to_disk(Path(folder))
        drive_to_disk(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        to_disk(target.parent)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except Exception as error:  # mlx and safetensors have errors of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError) and "rite" not in str(error) and "I/O" not in str(error):
            raise
        raise _cannot_write(target, error) from None


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    if not path.parent.is_dir():
        gone = "is gone: something deleted it or changed the working directory, a reward function perhaps"
        what = "is a file: move it away" if path.parent.exists() else gone
        return UserError(f"{path} cannot be written ({reason}): {path.parent} {what}")
    free = shutil.disk_usage(path.parent).free / 2**30
    return UserError(
        f"{path} cannot be written ({reason}; {free:.1f} GB free): make room, then continue with --resume"
    )


def environment_info() -> dict[str, Any]:
    """Return versions and machine, for recipe.yaml and reports."""
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
