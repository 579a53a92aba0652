"""The Python API: train, load, evaluate, compare. The command line is a thin user of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_posttrain import config, methods, runs
from mlx_posttrain.convert.files import read_json
from mlx_posttrain.engines.base import Loss
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import LoadedModel
from mlx_posttrain.rewards import functions
from mlx_posttrain.training.loop import Callbacks
from mlx_posttrain.training.method import Method, Resume


@dataclass(frozen=True)
class Run:
    """A run directory: ``folder``, and what is in it."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, one for each step and each evaluation."""
        return runs.Run(self.folder).metrics()

    @property
    def result(self) -> dict[str, Any]:
        """The figures of the final evaluation; {} for a run that is not finished."""
        path = self.folder / "result.json"
        return read_json(path) if path.is_file() else {}

    def model(self, engine: str = "auto", dtype: str | None = None) -> LoadedModel:
        """The trained model, opened as by :func:`load`."""
        return load(self.folder, engine, dtype)


def load(name: str | Path, engine: str = "auto", dtype: str | None = None) -> LoadedModel:
    """Open a run, a model or adapter folder, ``tiny``, or a hub id.

    engine: mlx, torch or auto. dtype: float32, bfloat16 or float16; None: the run's own, and of
    other models float32, or on a GPU that of their files. Raises UserError saying
    what is missing and what to do.
    """
    return LoadedModel(name, engine, dtype)


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    accept_edits: bool = False,
    loss: Loss | None = None,
    reward: Callable[..., Sequence[float | None]] | None = None,
    on_step: Callable[[Run, dict[str, Any]], object] | None = None,
    on_evaluate: Callable[[Run, dict[str, Any]], object] | None = None,
    on_save: Callable[[Run, Path], object] | None = None,
) -> Run:
    """Run a recipe to the end and return its run directory.

    recipe: a shipped recipe's name, a YAML file, or its keys; with ``resume`` the folder of an unfinished
    run. accept_edits: continue although its recipe.yaml was edited since the last checkpoint, and note there
    what was changed. overrides: dotted keys, as ``{"train.steps": 6}``. loss: ``loss(model, batch) ->
    (scalar, metrics)`` in place of the method's; see methods/sft.py. reward: ``f(prompts, completions,
    **columns) -> list of float or None`` in place of the recipe's rewards. on_step, on_evaluate, on_save:
    called as the run goes on, see :class:`~mlx_posttrain.training.loop.Callbacks`; one that returns True ends
    training after a checkpoint, and the run is finished with the weights so far.

    Raises UserError for every foreseeable failure; Ctrl-C saves and raises it too.
    """
    if resume:
        if isinstance(recipe, Mapping) or overrides:
            raise UserError(
                "resume=True continues a run with its own recipe: give its folder and no overrides"
            )
        _, raw = runs.reopen(recipe)
        chosen = methods.parse_recipe({**raw, "output": str(recipe)}, str(Path(recipe) / "recipe.yaml"))
    else:
        chosen = _recipe(recipe, dict(overrides or {}), reward)

    def hook(function: Callable[[Run, Any], object] | None) -> Callable[[Any, Any], object] | None:
        return None if function is None else lambda run, value: function(Run(run.folder), value)

    callbacks = Callbacks(hook(on_step), hook(on_evaluate), hook(on_save))
    method = methods.get(chosen.method)
    again: Resume = "edited" if resume and accept_edits else resume
    methods.run(chosen, again, callbacks, method if loss is None else _with_loss(method, loss))
    return Run(Path(chosen.output))


def _recipe(recipe: str | Path | Mapping[str, Any], overrides: dict[str, Any], reward: Any) -> Any:
    if reward is not None:
        overrides["reward"] = [{"function": functions.register(reward)}]
    if not isinstance(recipe, Mapping):
        return methods.load_recipe(str(recipe), overrides)
    raw = config.override(dict(recipe), overrides)
    return methods.parse_recipe(raw, "recipe", output=f"runs/{raw.get('method', 'recipe')}")


def _with_loss(method: Method, loss: Loss) -> Method:
    """The method with another loss."""
    if method.trains_on is None:
        raise UserError(f"{method.name} trains nothing itself, so it takes no loss")
    if method.algorithm is None:
        return replace(method, loss=lambda recipe: loss)
    algorithm = method.algorithm
    return replace(method, algorithm=lambda recipe: replace(algorithm(recipe), loss=loss))


def evaluate(name: str | Path, *, engine: str = "auto", dtype: str | None = None, **suite: Any) -> Any:
    """Ask and read one model: right answers, losses, perplexity, repetition, each with its interval.

    suite: its keys, listed by ``mlx-posttrain keys suite``. Returns as :func:`compare`.
    """
    return compare([name], engine=engine, dtype=dtype, **suite)


def compare(
    names: Sequence[str | Path],
    *,
    labels: Sequence[str] | None = None,
    engine: str = "auto",
    dtype: str | None = None,
    **suite: Any,
) -> Any:
    """Measure several models on the same questions and texts; the first is the baseline.

    dtype: as of :func:`load`, of every model. Returns an evaluate.comparison.Comparison: ``.table()`` is
    text, ``.to_dict()`` everything. Raises UserError for an unknown key of the suite and for a model that
    cannot be opened.
    """
    from mlx_posttrain.evaluation import suite as module

    settings = config.parse(dict(suite), module.SuiteSection, "settings")
    return module.compare([str(n) for n in names], settings, engine, labels, dtype=dtype)
