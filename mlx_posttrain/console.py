"""What a person sees while a run goes on: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

from mlx_posttrain.errors import UserError

#: Characters that steer a terminal, or make it show a line in another order; not the newline and the tab.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with escapes for characters that would act on a terminal: names come from others' files."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """A model's text for standard output: with escapes on a terminal, as it is in a file or a pipe."""
    return printable(text) if sys.stdout.isatty() else text


#: The lines printed inside ``lines_once``; None outside it.
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


@contextmanager
def lines_once() -> Iterator[None]:
    """Print equal lines once: what reads the same rows several times has the same to say of them."""
    token = _said.set(set()) if _said.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _said.reset(token)


def log(text: str) -> None:
    """One line for people, on standard error so that standard output stays for results."""
    if (said := _said.get()) is not None:
        if text in said:
            return
        said.add(text)
    print(printable(text), file=sys.stderr, flush=True)


def columns(first: Sequence[str], text: str) -> str:
    """A row whose last column is wrapped, so that it fits the terminal, or 80 columns where there is none."""
    begin = " ".join(first) + " "
    width = max(shutil.get_terminal_size().columns, len(begin) + 20)
    return textwrap.fill(
        text, width, initial_indent=begin, subsequent_indent=" " * len(begin), break_on_hyphens=False
    )


class Progress:
    """Loss, tokens/s, memory and time left. ``start`` is the step a resumed run continues from."""

    def __init__(self, name: str, steps: int, start: int = 0):
        self.name, self.steps, self.start = name, steps, start
        self.begun = self.spoke = time.monotonic()
        self.tokens = 0.0
        self.bar = None
        # a terminal that cannot move its cursor shows nothing of a bar
        if sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(name, total=steps, completed=start, status="")
            self.bar.start()

    def update(self, done: int, loss: float, tokens: float, memory_gb: float) -> None:
        """Show the state after ``done`` steps; ``tokens`` were trained in the last one."""
        self.tokens += tokens
        now = time.monotonic()
        elapsed = now - self.begun
        status = (
            f"loss {loss:.3f}  {self.tokens / max(elapsed, 1e-9):,.0f} trained tokens/s  {memory_gb:.2f} GB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=done, status=status)
        elif now - self.spoke > 10 or done in (self.start + 1, self.steps):
            left = elapsed / max(1, done - self.start) * (self.steps - done)
            log(f"{self.name} {done}/{self.steps}  {status}  {_duration(left)} left")
            self.spoke = now

    def note(self, text: str) -> None:
        """A line that stays (an evaluation, a checkpoint)."""
        if self.bar is not None:
            self.bar.console.print(printable(text), highlight=False, markup=False)
        else:
            log(text)

    def close(self) -> None:
        """Stop the live bar."""
        if self.bar is not None:
            self.bar.stop()


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Interrupted(UserError):
    """Ctrl-C or a termination signal; the run can be continued."""


def interrupted(signals: list[str], done: int, folder: Path) -> Interrupted:
    """What a loop raises when it ends early, after its checkpoint."""
    return Interrupted(
        f"interrupted ({signals[0]}) after step {done}; everything is saved: continue with --resume {folder}"
    )


def _pending(caught: list[str]) -> bool:
    """Whether a signal has come; Python runs its handler on entering a function, at the latest this one."""
    return bool(caught)


@contextmanager
def interruptible(folder: Path) -> Iterator[list[str]]:
    """Collect Ctrl-C and SIGTERM instead of breaking off inside an update; the loop looks between steps.

    Yields a list that becomes non-empty with the signal's name. A second Ctrl-C breaks off at once. Raises
    Interrupted for an error of the array library while one is pending, saying that the run in ``folder`` goes
    on from its last checkpoint: a terminal sends Ctrl-C to the whole process group, so to the compiler that
    MLX waits for as well, and the step fails for want of what it was to compile.
    """
    caught: list[str] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)
        log("stopping after this step (interrupt again to stop at once) ...")

    try:
        previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals alone
        yield caught
        return
    try:
        yield caught
    except RuntimeError:
        if not _pending(caught):
            raise
        raise Interrupted(
            f"interrupted ({caught[0]}) in the middle of a step: continue from the last checkpoint with "
            f"--resume {folder}"
        ) from None
    finally:
        for s, old in previous.items():
            signal.signal(s, old)
