"""A run's metrics in TensorBoard and Weights & Biases, for recipes whose ``log`` names them.

A tracker gets the resolved recipe once and every record of metrics.jsonl, which stays the primary record; a
tracker holds a copy to look at. It opens with the first record, so that a run that fails to start leaves
nothing in it. Nothing leaves the machine unless ``log`` names wandb.

    tensorboard    event files in RUN/tensorboard: ``tensorboard --logdir runs`` shows every run below
                   ``runs``
    wandb          project mlx-posttrain, the run named after its folder; a resumed run continues under the id
                   in RUN/wandb/id.txt. W&B adds what it always does (machine, git commit, load), without the
                   console; WANDB_MODE=offline keeps everything in RUN/wandb
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from mlx_posttrain.config import Recipe
from mlx_posttrain.errors import UserError

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Tracker(Protocol):
    """Where records go besides metrics.jsonl."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of one record at its step."""

    def rewind(self, step: int) -> None:
        """Forget what came after ``step`` (-1: everything): a resumed run logs it again."""

    def close(self, finished: bool) -> None:
        """Write what is buffered; ``finished`` is False for a run that failed.

        A second call does nothing.
        """


def check(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that cannot be used here.

    Either its package is missing, or W&B has no account to send to.
    """
    for name in names:
        package = _PACKAGES[name]
        spec = importlib.util.find_spec(package)
        # W&B leaves folders called wandb behind, which Python takes for namespace packages (no origin).
        if spec is None or spec.origin is None:
            raise UserError(
                f"log names {name}, but its package is not installed: pip install {package}, or "
                f"leave {name} out of log"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        with _wandb_errors():
            wandb.login(verify=False)


def make(names: Sequence[str], folder: Path, recipe: Recipe) -> list[Tracker]:
    """Return the trackers of a run in ``folder``, each once."""
    kinds: dict[str, Callable[[Path, Recipe], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    return [kinds[name](folder, recipe) for name in dict.fromkeys(names)]


def close_all(trackers: Sequence[Tracker], finished: bool) -> None:
    """Close every tracker."""
    for tracker in trackers:
        tracker.close(finished)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        k: v
        for k, v in record.items()
        if k != "step" and isinstance(v, (int, float)) and not isinstance(v, bool)
    }


class TensorBoard:
    """Event files, one for each start or resume of the run."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder / "tensorboard", recipe
        self.first = 0  # the first step that this process logs
        self.writer: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self.writer is None:
            self._open()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in _numbers(record).items()]
        self.writer.write_event(
            Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        )
        # Before the checkpoint of this step is written: a resume from it does not log the step again.
        self.writer.flush()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        self.folder.mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread dies silently on a full disk. The number keeps files of the same
        # second apart and in order.
        number = sum(1 for _ in self.folder.glob("events.*"))
        self.writer = EventsWriter(str(self.folder / "events"), f".{number:04d}")
        now = time.time()
        # At a START event TensorBoard drops what earlier files hold from this step on.
        self.writer.write_event(
            Event(wall_time=now, step=self.first, session_log=SessionLog(status=SessionLog.START))
        )
        if number == 0:
            recipe = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            self.writer.write_event(Event(wall_time=now, step=0, summary=text("recipe", f"```\n{recipe}```")))

    def rewind(self, step: int) -> None:
        self.close(finished=False)
        self.first = step + 1

    def close(self, finished: bool) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # every record is on the disk already
                self.writer.close()
            self.writer = None


class WeightsAndBiases:
    """A run on Weights & Biases, or in offline mode a folder that ``wandb sync`` sends there later."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe
        self.first = 0  # the first step that W&B does not have yet
        self.run: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        with _wandb_errors():
            if self.run is None:
                self._open()
            # W&B cannot rewind. The steps it already has of a killed run hold the same numbers, because a
            # resume is exact.
            if record["step"] >= self.first:
                self.run.log(_numbers(record), step=record["step"])

    def _open(self) -> None:
        import wandb

        # Random and stored rather than derived from the path: after this run is deleted, another one may be
        # started in the same folder.
        id_file = self.folder / "wandb" / "id.txt"
        if not id_file.is_file():
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project="mlx-posttrain",
            name=self.folder.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            dir=str(self.folder),
            config=self.recipe.model_dump(mode="json"),
            resume="allow",
            reinit="create_new",
            settings={"console": "off"},
        )
        self.first = self.run.step if self.run.resumed else 0

    def rewind(self, step: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        if self.run is not None:
            run, self.run = self.run, None
            with _wandb_errors():
                run.finish(exit_code=0 if finished else 1)


@contextlib.contextmanager
def _wandb_errors() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"log names wandb: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or leave wandb "
            "out of log"
        ) from None
