"""The supervised loop: order the rows, step, evaluate, keep the best, checkpoint, resume.

Everything a step depends on is the recipe, the data, and what a checkpoint holds (trained weights, optimizer
moments, random state, step number), so a run that is killed and resumed gives the losses of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.config import OptimizerSection
from mlx_posttrain.console import Progress, interrupted, interruptible, say
from mlx_posttrain.convert.files import require_space
from mlx_posttrain.data import batches
from mlx_posttrain.data.dataset import TrainingData
from mlx_posttrain.engines.base import AdamW, Engine, Loss, Model, Trainer
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs import Run
from mlx_posttrain.training.checks import (
    blown_up,
    check_settings,
    fingerprint,
    not_finite,
    same_data,
    tell_compiled,
)
from mlx_posttrain.training.schedule import learning_rate


def adamw(train: OptimizerSection) -> AdamW:
    """The optimizer's settings from a recipe."""
    return AdamW(train.beta1, train.beta2, train.eps, train.weight_decay, train.clip)


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
