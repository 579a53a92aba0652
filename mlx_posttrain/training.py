"""The supervised loop: order the rows, step, evaluate, keep the best, checkpoint, resume.

Everything a step depends on is the recipe, the data, and what a checkpoint holds (trained weights, optimizer
moments, random state, step number), so a run that is killed and resumed gives the losses of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_posttrain.convert.files import require_space
from mlx_posttrain.data import batches
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW, Engine, Loss, Model, Trainer
from mlx_posttrain.errors import UserError
from mlx_posttrain.progress import Progress, interrupted, interruptible, say
from mlx_posttrain.recipe import OptimizerSection, TrainSection
from mlx_posttrain.runs import Run
from mlx_posttrain.schedule import learning_rate


def adamw(train: OptimizerSection) -> AdamW:
    """The optimizer's settings from a recipe."""
    return AdamW(train.beta1, train.beta2, train.eps, train.weight_decay, train.clip)


class TrainingData(Protocol):
    """What the loop asks its data for; :class:`Data` for rows to imitate, pairs.PairData for pairs."""

    settings: TrainSection
    steps: int
    steps_per_epoch: int

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of a step, by micro-batch."""

    def micro_batches(self, rows: list[list[int]]) -> list[batches.Batch]:
        """The batches of those rows."""

    def evaluation(self) -> list[batches.Batch]:
        """Held-out rows in batches."""


Figures = Mapping[str, Sequence[np.ndarray]]


class Data:
    """Training and held-out examples, and the batches of any step."""

    def __init__(
        self,
        train: Sequence[Example],
        held_out: Sequence[Example],
        settings: TrainSection,
        seed: int,
        context: int | None,
    ):
        self.train, self.held_out, self.settings, self.seed, self.context = (
            train,
            held_out,
            settings,
            seed,
            context,
        )
        #: What batches carry besides, by name: for each training row, and each held-out row, an array over
        #: its trained tokens.
        self.figures: Figures = {}
        self.held_out_figures: Figures = {}
        self.lengths = [len(e.tokens) for e in train]
        self._epoch = -1
        self.steps_per_epoch = math.ceil(len(train) / (settings.batch_size * settings.accumulate))
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * self.steps_per_epoch))

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of a step, by micro-batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            s = self.settings
            self._order = batches.steps(
                self.lengths,
                batch_size=s.batch_size,
                accumulate=s.accumulate,
                seed=self.seed,
                epoch=epoch,
                token_budget=s.token_budget,
            )
            self._epoch = epoch
        return self._order[position]

    def micro_batches(self, rows: list[list[int]]) -> list[batches.Batch]:
        """The batches of those rows."""
        return [self._batch(self.train, self.figures, r) for r in rows]

    def evaluation(self) -> list[batches.Batch]:
        """Held-out rows in batches, larger than those of training: see batches.EVALUATION_FACTOR."""
        lengths = [len(e.tokens) for e in self.held_out]
        rows = batches.for_evaluation(lengths, self.settings.batch_size, self.settings.token_budget)
        return [self._batch(self.held_out, self.held_out_figures, r) for r in rows]

    def _batch(self, examples: Sequence[Example], figures: Figures, rows: list[int]) -> batches.Batch:
        batch = batches.collate([examples[i] for i in rows], self.context)
        return batches.with_rows(batch, {name: [values[i] for i in rows] for name, values in figures.items()})


def fit(
    engine: Engine,
    model: Model,
    loss: Loss,
    data: TrainingData,
    run: Run,
    *,
    resume: bool = False,
    on_evaluate: Callable[[int], None] | None = None,
    before: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train ``model`` on ``data`` and leave the chosen weights in ``run.final``; returns the evaluation of
    those weights and the step they are of.

    ``on_evaluate(step)`` is called after each evaluation, to write samples; ``before()`` once, when the
    settings have been checked, to give ``data`` what its batches carry besides. Raises UserError for settings
    that the data cannot meet, for data that differ from those of the run that is resumed, for a non-finite
    loss, in training or held out (earlier checkpoints stay, the batch is named), for a full disk, and for
    Ctrl-C (checkpointed).
    """
    train = data.settings
    trainer = engine.trainer(model, adamw(train))
    total, trained = model.parameter_counts()
    eval_every = train.eval_every or max(1, data.steps // 10)
    save_every = train.save_every or eval_every
    held_out = data.evaluation()
    checkpoint_bytes = 12 * trained + 2**20  # float32 weights and two moments
    try:
        check_settings(data, held_out)
        state: dict[str, Any] = {
            "best": None,
            "best_loss": None,
            "worse": 0,
            "evaluation": {},
            "best_evaluation": {},
        }
        state["data"] = fingerprint(data, held_out)
        require_space(run.folder, checkpoint_bytes)
    except UserError:
        if not resume:
            run.discard()
        raise
    if not held_out and train.select == "best":
        say(
            "there are no held-out rows to choose the best weights by: final/ will hold those of the last "
            "step"
        )
    first = _restore(engine, model, trainer, run, state) if resume else 0
    engine.reset_memory()
    if before is not None:
        before()
        held_out = data.evaluation()

    def write(folder: Path) -> None:
        model.save(folder / "weights")
        trainer.save(folder / "optimizer.safetensors")

    def checkpoint(done: int, seen: Sequence[batches.Batch]) -> None:
        # The step's loss is of the weights before it: ask once more, or weights that have blown up would be
        # kept as good ones.
        after = model.evaluate(loss, seen[:1])["loss"]
        if not math.isfinite(after):
            raise blown_up(done, f"the loss with the weights that it made is {after}", run)
        try:
            require_space(run.folder, checkpoint_bytes)
        except UserError as error:
            raise UserError(
                f"step {done} is not saved: {error}; then continue with --resume {run.folder}"
            ) from None
        run.save_checkpoint(done, write, state, engine.random_state(), train.keep)

    def evaluate(done: int) -> bool:
        """Whether to go on."""
        if not held_out:
            return True
        metrics = model.evaluate(loss, held_out)
        if not math.isfinite(metrics["loss"]):
            raise blown_up(done, f"the held-out loss is {metrics['loss']}", run)
        run.log({"step": done, **{f"eval/{k}": v for k, v in metrics.items()}})
        better = state["best_loss"] is None or metrics["loss"] < state["best_loss"]
        if better:
            state["best"] = run.save_best(done, model.save) if train.select == "best" else None
            state["best_loss"], state["worse"] = metrics["loss"], 0
            state["best_evaluation"] = {**metrics, "step": done}
        else:
            state["worse"] += 1
        state["evaluation"] = {**metrics, "step": done}
        progress.note(f"step {done}: held-out loss {metrics['loss']:.4f}{' (best)' if better else ''}")
        if on_evaluate is not None:
            on_evaluate(done)
        return train.early_stop is None or state["worse"] < train.early_stop

    progress = Progress(run.folder.name, data.steps, first)
    try:
        with interruptible(run.folder) as signals:
            if first == 0:
                evaluate(0)
            # and then killed before it was done
            stopped_early = train.early_stop is not None and state["worse"] >= train.early_stop
            for step in range(first, 0 if stopped_early else data.steps):
                rows = data.rows(step)
                micro = data.micro_batches(rows)
                lr = learning_rate(
                    step,
                    steps=data.steps,
                    peak=train.lr,
                    schedule=train.schedule,
                    warmup=train.warmup,
                    floor=train.min_lr,
                )
                begun = time.perf_counter()
                try:
                    metrics = trainer.step(loss, micro, lr)
                except FloatingPointError as error:
                    batch = (
                        f"The batch: training rows {[i for part in rows for i in part][:16]}, counted "
                        "from 0 after filtering"
                    )
                    advice = f"{batch}. Look at those rows, or start anew with a lower train.lr"
                    raise not_finite(step, error, run, advice) from None
                done = step + 1
                tokens = sum(b.trained_tokens for b in micro)
                memory = engine.memory()
                run.log(
                    {
                        "step": done,
                        "epoch": done / data.steps_per_epoch,
                        "lr": lr,
                        "tokens": tokens,
                        **metrics,
                        "seconds": time.perf_counter() - begun,
                        **memory,
                    }
                )
                progress.update(done, metrics["loss"], tokens, memory["peak_gb"])
                going = True
                if done % eval_every == 0 or done == data.steps:
                    going = evaluate(done)
                if done % save_every == 0 or done == data.steps or signals or not going:
                    checkpoint(done, micro)
                if signals and done < data.steps:
                    raise interrupted(signals, done, run.folder)
                if not going:
                    progress.note(f"early stop: {state['worse']} evaluations without a better held-out loss")
                    break
    finally:
        progress.close()
    tell_compiled(trainer)
    if state["best"] and train.select == "best":
        model.load_trained(run.checkpoints / state["best"])
        state["evaluation"] = state["best_evaluation"]
        if state["evaluation"]["step"] == 0:
            say(
                "no evaluation was better than the first: final/ holds the model as it was before training; "
                "see metrics.jsonl, or set train.select=last"
            )
    return {**state["evaluation"], "parameters": total, "trained_parameters": trained}


def _restore(engine: Engine, model: Model, trainer: Trainer, run: Run, state: dict[str, Any]) -> int:
    newest = run.newest_checkpoint()
    if newest is None:
        run.truncate_logs(-1)
        return 0
    saved = newest.state
    same_data(saved["data"], state["data"], run)
    state.update({k: saved[k] for k in state})
    model.load_trained(newest.folder / "weights")
    trainer.load(newest.folder / "optimizer.safetensors")
    engine.set_random_state(newest.arrays)
    run.truncate_logs(saved["step"])
    return saved["step"]


def tell_compiled(*trainers: Trainer) -> None:
    """Say how often steps were compiled, where they are: what makes a first epoch slower than the next."""
    compiled = sum(t.compiled for t in trainers)
    if compiled:
        say(f"steps were compiled {compiled} times: once for each shape of batches")


def not_finite(step: int, error: FloatingPointError, run: Run, advice: str) -> UserError:
    """What to say when step ``step``, counted from 0, had a loss or gradient that is not finite; the
    checkpoints there are stay.

    The present weights are not saved: they may be what is wrong, as an update can overflow a step earlier.
    """
    return UserError(
        f"step {step + 1}: {error}: stopped before the weights took it; {_last_good(run)}. {advice}"
    )


def blown_up(done: int, what: str, run: Run) -> UserError:
    """What to say of weights, after ``done`` steps, that give figures that are not finite (``what``); they
    are not saved.
    """
    if done == 0:
        return UserError(
            f"before the first step {what}: the model that the run starts from is broken, or the rows are; "
            "nothing was trained"
        )
    return UserError(
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


def check_settings(data: TrainingData, held_out: Sequence[batches.Batch]) -> None:
    """Raise UserError for settings that these rows cannot meet, before anything is trained."""
    train = data.settings
    check_warmup(train, data.steps)
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
    beyond += [b.tokens.size for b in _epoch(data) if b.tokens.size > train.token_budget]
    if beyond:
        raise UserError(
            f"train.token_budget={train.token_budget} is too small: the longest row takes {max(beyond)} "
            "padded tokens by itself; "
            f"raise it to {max(beyond)}, or lower data.max_length"
        )


def fingerprint(data: TrainingData, held_out: Sequence[batches.Batch]) -> dict[str, dict[str, Any]]:
    """What a run's figures depend on besides its recipe: the number of rows of both parts, and a hash of
    their batches in order.

    Of the training rows those of the first epoch, as far as the run takes them.
    """
    trained = sum(
        len(part) for step in range(min(data.steps, data.steps_per_epoch)) for part in data.rows(step)
    )
    return {
        "training": {"rows": trained, "hash": _hash(_epoch(data))},
        "held-out": {"rows": sum(len(b.tokens) for b in held_out), "hash": _hash(held_out)},
    }


def _epoch(data: TrainingData) -> Iterable[batches.Batch]:
    for step in range(min(data.steps, data.steps_per_epoch)):
        yield from data.micro_batches(data.rows(step))


def _hash(parts: Iterable[batches.Batch]) -> str:
    digest = hashlib.sha256()
    for b in parts:
        for array in (
            b.tokens,
            b.index,
            b.target,
            b.weight,
            b.row,
            *(b.extra[name] for name in sorted(b.extra)),
        ):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def same_data(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], run: Run) -> None:
    """Raise UserError when a resumed run meets other rows than it began with; both as :func:`fingerprint`
    gives them.
    """
    for part, old in before.items():
        if old != now[part]:
            new = now[part]["rows"]
            how = (
                f"{old['rows']} rows then, {new} now"
                if old["rows"] != new
                else f"{new} rows as before, with other content"
            )
            raise UserError(
                f"the {part} rows are not those that {run.folder} began with ({how}): put the data back as "
                "they were, or start anew with output=DIR"
            )
