"""What a loop refuses: impossible settings, other data than it began with, non-finite figures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlx_posttrain.config import OptimizerSection
from mlx_posttrain.console import log
from mlx_posttrain.data import batches
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.engines.base import Trainer
from mlx_posttrain.errors import Diverged, UserError
from mlx_posttrain.runs import Run


def print_compiled(trainers: Iterable[Trainer]) -> None:
    """Say how often steps were compiled: what makes a first epoch slower than the next."""
    compiled = sum(t.compiled for t in trainers)
    if compiled:
        log(f"steps were compiled {compiled} times: once for each shape of batches")


def not_finite(step: int, error: FloatingPointError, run: Run, advice: str) -> Diverged:
    """The error for a loss or gradient that is not finite in ``step``, counted from 0.

    The checkpoints stay.

    The present weights are not saved: they may be what is wrong, as an update can overflow a step earlier.
    """
    return Diverged(
        f"step {step + 1}: {error}: stopped before the weights took it; {_last_good(run)}. {advice}"
    )


def blown_up(done: int, what: str, run: Run) -> UserError:
    """The error for weights, after ``done`` steps, whose results are not finite (``what``).

    They are not saved.
    """
    if done == 0:
        return UserError(
            f"before the first step {what}: the model that the run starts from is broken, or the rows are; "
            "nothing was trained"
        )
    return Diverged(
        f"step {done}: {what}: these weights are not saved; {_last_good(run)}. Start anew with "
        "a lower train.lr"
    )


def _last_good(run: Run) -> str:
    saved = run.list_checkpoints()
    return (
        f"the last good checkpoint is {saved[-1]}"
        if saved
        else f"no checkpoint had been written yet, so delete {run.folder} or give another output before the "
        "next run"
    )


def check_warmup(train: OptimizerSection, steps: int) -> None:
    """Raise UserError for a warm-up that is as long as the run."""
    if train.warmup >= 1 and train.warmup >= steps:
        raise UserError(
            f"train.warmup={train.warmup:g} steps, and the run has {steps}: the learning rate would not "
            "reach train.lr; "
            "lower it, give a share of the steps (below 1), or train for longer"
        )


def check_settings(dataset: Dataset, held_out: Sequence[batches.Batch]) -> None:
    """Raise UserError for settings that these rows cannot meet, before anything is trained."""
    train = dataset.settings
    check_warmup(train, dataset.steps)
    if train.early_stop is not None and not held_out:
        raise UserError(
            "train.early_stop needs held-out rows to stop by: give data.eval_split or "
            "data.holdout, or leave it out"
        )
    if train.token_budget is None:
        return
    beyond = [
        b.tokens.size for b in held_out if b.tokens.size > batches.EVALUATION_FACTOR * train.token_budget
    ]
    beyond += [b.tokens.size for b in _epoch(dataset) if b.tokens.size > train.token_budget]
    if beyond:
        raise UserError(
            f"train.token_budget={train.token_budget} is too small: the longest row takes {max(beyond)} "
            "padded tokens by itself; "
            f"raise it to {max(beyond)}, or lower data.max_length"
        )


def fingerprint(dataset: Dataset, held_out: Sequence[batches.Batch]) -> dict[str, dict[str, Any]]:
    """What a run's results depend on besides its recipe, for both parts of the data.

    The number of rows, and a hash of their batches in order.

    Of the training rows those of the first epoch, as far as the run takes them.
    """
    trained = sum(
        len(part)
        for step in range(min(dataset.steps, dataset.steps_per_epoch))
        for part in dataset.rows(step)
    )
    return {
        "training": {"rows": trained, "hash": _hash(_epoch(dataset))},
        "held-out": {"rows": sum(len(b.tokens) for b in held_out), "hash": _hash(held_out)},
    }


def _epoch(dataset: Dataset) -> Iterable[batches.Batch]:
    for step in range(min(dataset.steps, dataset.steps_per_epoch)):
        yield from dataset.micro_batches(dataset.rows(step))


def _hash(parts: Iterable[batches.Batch]) -> str:
    digest = hashlib.sha256()
    for b in parts:
        for array in (
            b.tokens,
            b.index,
            b.target,
            b.mask,
            b.row,
            *(b.extra[name] for name in sorted(b.extra)),
        ):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def same_data(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], run: Run) -> None:
    """Raise UserError when a resumed run meets other rows than it began with.

    Both arguments are as :func:`fingerprint` gives them.
    """
    for part, old in before.items():
        if part in now and old != now[part]:
            new = now[part]["rows"]
            how = (
                f"{old['rows']} rows then, {new} now"
                if old["rows"] != new
                else f"{new} rows as before, with other content"
            )
            what = part if part.endswith("prompts") else f"{part} rows"
            raise UserError(
                f"the {what} are not those that {run.folder} began with ({how}): put the data back as "
                "they were, or start anew with output=DIR"
            )
