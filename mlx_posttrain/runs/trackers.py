"""A run's figures in TensorBoard and Weights & Biases, for recipes whose ``log`` names them.

A tracker gets the resolved recipe once and every record of metrics.jsonl, which stays the truth: a tracker is
a copy for the eye. It opens with the first record, so a start that fails leaves nothing of it. Nothing leaves
the machine unless ``log`` names wandb.

tensorboard      event files in RUN/tensorboard: ``tensorboard --logdir runs`` shows every run below ``runs``
wandb            project mlx-posttrain, the run named as its folder; a resumed run goes on under the id in
RUN/wandb/id.txt. W&B adds
                 what it always does (machine, git commit, load), without the console; WANDB_MODE=offline
                 keeps it all in RUN/wandb
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
        """Take the numbers of one record, at its step."""

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``, -1 for everything: a resumed run logs it again."""

    def close(self, finished: bool) -> None:
        """Write what is left; ``finished`` tells whether the run came to its end. A second call does
        nothing.
        """


def check(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that cannot be used here: its package is missing, or W&B has no account
    to send to.
    """
    for name in names:
        package = _PACKAGES[name]
        found = importlib.util.find_spec(package)
        # W&B itself leaves folders called wandb about, and Python takes those for packages without a file.
        if found is None or found.origin is None:
            raise UserError(
                f"log names {name}, and its package is not installed: pip install {package}, or "
                f"leave {name} out of log"
            )
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        with _wandb_errors():
            wandb.login(verify=False)


def make(names: Sequence[str], folder: Path, recipe: Recipe) -> list[Tracker]:
    """The trackers of a run in ``folder``, each once."""
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
    """Event files, one for each time that the run was started or resumed."""

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
        # before the checkpoint of this step: a run killed after that is never asked for it again
        self.writer.flush()

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        self.folder.mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread dies of a full disk without a word. The number keeps files of one
        # second apart and in order.
        number = sum(1 for _ in self.folder.glob("events.*"))
        self.writer = EventsWriter(str(self.folder / "events"), f".{number:04d}")
        now = time.time()
        # TensorBoard drops what earlier files hold from this step on.
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
            # W&B takes back no step; those it has of a killed run are the same figures, because a resume is
            # exact.
            if record["step"] >= self.first:
                self.run.log(_numbers(record), step=record["step"])

    def _open(self) -> None:
        import wandb

        # Drawn and kept rather than made from the path: another run may be started in this folder when this
        # one has been deleted.
        known = self.folder / "wandb" / "id.txt"
        if not known.is_file():
            known.parent.mkdir(exist_ok=True)
            known.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project="mlx-posttrain",
            name=self.folder.resolve().name,
            id=known.read_text(encoding="utf-8").strip(),
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
