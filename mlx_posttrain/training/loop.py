"""The training loop, for rows and for rollouts: step, evaluate, keep the best, checkpoint, resume.

What a step does is a :class:`Learner`'s business (training/rows.py, rl/learner.py). Everything a step depends
on is the recipe, the data, and what a checkpoint holds (trained weights, optimizer moments, random state,
step number, the learner's state), so a run that is killed and resumed gives the losses of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_posttrain.config import OptimizerSection
from mlx_posttrain.console import Progress, interrupted, interruptible, log
from mlx_posttrain.convert.files import require_space
from mlx_posttrain.engines.base import Engine, Trainer
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs import Run
from mlx_posttrain.training.checks import blown_up, not_finite, print_compiled, same_data
from mlx_posttrain.training.schedule import learning_rate

Hook = Callable[[Any, Any], object]


@dataclass(frozen=True)
class Callbacks:
    """Functions that are called as a run goes on; one that returns True ends training after a checkpoint.

    on_step(run, row): after each step, with its record. on_evaluate(run, row): after each evaluation.
    on_save(run, path): after each checkpoint.
    """

    on_step: Hook | None = None
    on_evaluate: Hook | None = None
    on_save: Hook | None = None


class Learner(Protocol):
    """What the loop drives: models with their optimizers, and the data they learn from."""

    steps: int

    @property
    def select_by(self) -> str | None:
        """The held-out figure by which the best weights are chosen; None: the last step's are final."""

    @property
    def finite(self) -> tuple[str, str]:
        """The held-out figure that must be finite, and what it is called in an error."""

    @property
    def trainers(self) -> Mapping[str, Trainer]:
        """The optimizers, by the name of their file in a checkpoint."""

    def check(self) -> None:
        """Raise UserError for settings that the data cannot meet, before anything is trained."""

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What a run's losses depend on besides its recipe, by part: ``rows`` and a ``hash``."""

    def parameter_counts(self) -> tuple[int, int]:
        """(all, trained) parameters of the model that the run is about."""

    def trained_parameters(self) -> int:
        """Trained parameters of all models, for the space that a checkpoint takes."""

    def prepare(self) -> None:
        """Compute what all steps need, in a new run and in a resumed one."""

    def begin(self) -> None:
        """Do what only a new run does before its first evaluation."""

    def step(self, step: int, lr: float) -> dict[str, float]:
        """Do step ``step``, counted from 0; returns its record, with ``tokens``.

        Raises FloatingPointError, leaving the weights as they were, for a loss that is not finite.
        """

    def headline(self, record: Mapping[str, float]) -> float:
        """The loss to show beside the progress bar."""

    def advice(self, step: int) -> str:
        """What to look at when step ``step`` was not finite."""

    def problem(self) -> str | None:
        """What is not finite under the weights that the last step made; None where all is well."""

    def evaluate(self) -> dict[str, float] | None:
        """Held-out figures; None without held-out data."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        """An evaluation in one line."""

    def write_samples(self, step: int) -> None:
        """Write a few texts or scores to samples.jsonl."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizers of a checkpoint."""

    def load(self, folder: Path) -> None:
        """Read them back."""

    def save_model(self, folder: Path) -> None:
        """Write the weights that may become the final ones."""

    def load_model(self, folder: Path) -> None:
        """Read them back."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides arrays, as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take it back."""


def fit(
    engine: Engine,
    learner: Learner,
    run: Run,
    train: OptimizerSection,
    *,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Train to the end; returns the evaluation of the final weights and the step they are of.

    Raises UserError for settings that the data cannot meet, for other data than those of the run that is
    resumed, for a non-finite loss, in training or held out (earlier checkpoints stay), for a full disk, and
    for Ctrl-C (checkpointed). A new run in which nothing was trained is taken away again.
    """
    call = callbacks or Callbacks()
    try:
        learner.check()
        state: dict[str, Any] = {
            "best": None,
            "best_loss": None,
            "worse": 0,
            "evaluation": {},
            "best_evaluation": {},
            "data": learner.fingerprint(),
        }
        needed = 12 * learner.trained_parameters() + 2**20  # float32 weights and two moments
        require_space(run.folder, needed)
    except UserError:
        if not resume:
            run.discard()
        raise
    eval_every = train.eval_every or max(1, learner.steps // 10)
    save_every = train.save_every or eval_every
    select_best = learner.select_by is not None and getattr(train, "select", "last") == "best"
    early_stop: int | None = getattr(train, "early_stop", None)

    def checkpoint(done: int) -> bool:
        """Returns whether to stop."""
        # A step's loss is of the weights before it: look once more, or weights that have blown up would be
        # kept as good ones.
        problem = learner.problem()
        if problem is not None:
            raise blown_up(done, problem, run)
        try:
            require_space(run.folder, needed)
        except UserError as error:
            raise UserError(
                f"step {done} is not saved: {error}; then continue with --resume {run.folder}"
            ) from None
        saved = {**state, **learner.state()}
        path = run.save_checkpoint(done, learner.save, saved, engine.random_state(), train.keep)
        return call.on_save is not None and call.on_save(run, path) is True

    def evaluate(done: int) -> bool:
        """Returns whether to stop."""
        stop = False
        metrics = learner.evaluate()
        if metrics is not None:
            name, called = learner.finite
            if not math.isfinite(metrics[name]):
                raise blown_up(done, f"the held-out {called} is {metrics[name]}", run)
            row = {"step": done, **{f"eval/{k}": v for k, v in metrics.items()}}
            run.log(row)
            better = _keep_best(learner, run, state, metrics, done, select_best)
            state["evaluation"] = {**metrics, "step": done}
            progress.note(f"step {done}: {learner.describe(metrics)}{' (best)' if better else ''}")
            stop = call.on_evaluate is not None and call.on_evaluate(run, row) is True
        learner.write_samples(done)
        return stop

    def converged() -> bool:
        return early_stop is not None and state["worse"] >= early_stop

    first = _restore(engine, learner, run, state) if resume else 0
    if resume:
        log(
            f"resuming at step {first} of {learner.steps}"
            if first
            else "resuming at step 0: the run was stopped before its first checkpoint"
        )
    engine.reset_memory()
    learner.prepare()
    progress = Progress(run.folder.name, learner.steps, first)
    try:
        with interruptible(run.folder) as signals, engine.resident():
            if first == 0:
                learner.begin()
                evaluate(0)
            # A run that stopped early may have been killed before it was finished.
            for step in range(first, 0 if converged() else learner.steps):
                begun = time.perf_counter()
                lr = learning_rate(
                    step,
                    steps=learner.steps,
                    peak=train.lr,
                    schedule=train.schedule,
                    warmup=train.warmup,
                    floor=train.min_lr,
                )
                try:
                    record = learner.step(step, lr)
                except FloatingPointError as error:
                    raise not_finite(step, error, run, learner.advice(step)) from None
                done, memory = step + 1, engine.memory()
                row = {"step": done, "lr": lr, **record, "seconds": time.perf_counter() - begun, **memory}
                run.log(row)
                progress.update(done, learner.headline(record), record["tokens"], memory["peak_gb"])
                last = done == learner.steps
                stop = call.on_step is not None and call.on_step(run, row) is True
                if done % eval_every == 0 or last or stop:
                    stop |= evaluate(done)
                if done % save_every == 0 or last or signals or stop or converged():
                    stop |= checkpoint(done)
                if signals and not last:
                    raise interrupted(signals, done, run.folder)
                if converged():
                    progress.note(f"early stop: {state['worse']} evaluations without a better held-out loss")
                    break
                if stop:
                    break
    finally:
        progress.close()
    print_compiled(learner.trainers.values())
    if select_best and state["best"]:
        learner.load_model(run.checkpoints / state["best"])
        state["evaluation"] = state["best_evaluation"]
        if state["evaluation"]["step"] == 0:
            log(
                "no evaluation was better than the first: final/ holds the model as it was before training; "
                "see metrics.jsonl, or set train.select=last"
            )
    total, trained = learner.parameter_counts()
    return {**state["evaluation"], "parameters": total, "trained_parameters": trained}


def _keep_best(
    learner: Learner, run: Run, state: dict[str, Any], metrics: Mapping[str, float], done: int, save: bool
) -> bool:
    """Note whether an evaluation is the best so far, and with ``save`` keep its weights."""
    if learner.select_by is None:
        return False
    value = metrics[learner.select_by]
    if state["best_loss"] is not None and value >= state["best_loss"]:
        state["worse"] += 1
        return False
    state["best"] = run.save_best(done, learner.save_model) if save else None
    state["best_loss"], state["worse"] = value, 0
    state["best_evaluation"] = {**metrics, "step": done}
    return True


@contextlib.contextmanager
def _written_by_a_run(checkpoint: Path) -> Iterator[None]:
    """Raise UserError where a state.json of an earlier release, without a hash, lacks what is read of it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{checkpoint}/state.json is not what a run writes: take that folder away, to continue from the "
            "checkpoint before it"
        ) from None


def _restore(engine: Engine, learner: Learner, run: Run, state: dict[str, Any]) -> int:
    """Go back to the newest whole checkpoint; returns its step, 0 where there is none."""
    newest = run.newest_checkpoint()
    if newest is None:
        run.truncate_logs(-1)
        return 0
    saved = newest.state
    with _written_by_a_run(newest.folder):
        same_data(saved["data"], state["data"], run)
        state.update({name: saved[name] for name in state if name in saved and name != "data"})
    learner.load(newest.folder)
    with _written_by_a_run(newest.folder):
        learner.restore(saved)
    engine.set_random_state(newest.arrays)
    run.truncate_logs(saved["step"])
    return int(saved["step"])
