"""A pipeline: several recipes in order, each using what earlier ones made.

    stages:
      sft:    {recipe: 01_sft}
      reward: {recipe: 07_reward, set: {model: "{sft}"}}
      ppo:    {recipe: 07_ppo, set: {model: "{sft}", reward: [{model: "{reward}"}]}}

``{NAME}`` stands for that stage's run directory, ``output/NAME``, in ``set`` and in a recipe that is written
out in the pipeline. Every stage is an ordinary run: it can be looked at, exported and used alone. All recipes
are read and checked when the pipeline is, so a mistyped key in the last stage is found before the first one
starts. A stage with a ``grid`` is spread out into a run for each combination (pipeline/grid.py), and the
pipeline ends with a table of them; a run of a grid that diverges is counted there and stops nothing.
``pipeline.json`` says how far each stage is (waiting, running, finished, interrupted, failed, diverged), how
long it took and what came out. ``--resume`` skips finished stages and continues the one that was cut off.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_posttrain import config, engines, methods, runs
from mlx_posttrain.console import Interrupted, log
from mlx_posttrain.convert.files import home, read_json
from mlx_posttrain.errors import Diverged, UserError
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.pipeline.grid import Cell
from mlx_posttrain.pipeline.recipe import Recipe, merged, parse, stage_recipes, sweep
from mlx_posttrain.runs import lock
from mlx_posttrain.training.loop import Callbacks
from mlx_posttrain.training.method import Method, Resume

__all__ = ["METHOD", "Recipe", "plan", "run", "stage_recipes", "sweep"]

ENDED = ("finished", "diverged")


def run(recipe: Recipe, resume: Resume = False, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """Run all stages that have no result yet; returns {stage: its figures}. ``callbacks`` go to every stage.

    Raises UserError as the stages' methods do, naming the stage, and Interrupted for Ctrl-C, saying how to
    resume the pipeline.
    """
    assert recipe.output is not None
    recipe.output = str(home(recipe.output).absolute())
    # a resumed pipeline stays on its engine
    recipe.engine = engines.get(recipe.engine).name  # type: ignore[assignment]
    # it may be resumed from another folder, with stages to come that name files relative to this one
    for stage in recipe.stages.values():
        stage.recipe, stage.set = config.absolute_paths(stage.recipe), config.absolute_paths(stage.set)
    chosen, whole = stage_recipes(recipe), Path(recipe.output)
    for own in chosen.values():
        engines.get(own.engine)
    here = runs.reopen(whole, write=True)[0] if resume else None
    state = _state(whole, chosen)
    settings = {name: merged(stage.recipe, stage.set) for name, stage in recipe.stages.items()}
    for name in chosen:
        _check_begun(whole / name, name, state[name], settings[name])
    if all(stage["state"] in ENDED for stage in state.values()):
        if here is not None:
            here.close()
        raise UserError(
            f"{whole} is finished: there is nothing to resume"
            if resume
            else f"{whole} holds a finished pipeline: choose another folder with output=DIR, or delete it"
        )
    if here is None:
        here = runs.create(whole, recipe)  # type: ignore[arg-type]
    for number, (name, own) in enumerate(chosen.items(), 1):
        one = runs.Run(whole / name)
        ended = one.finished or state[name]["state"] == "diverged"
        log(
            f"stage {number} of {len(chosen)}, {name}: "
            f"{'finished before' if ended else own.description or own.method}"
        )
        if not ended:
            state[name]["recipe"] = settings[name]
            try:
                _run_stage(name, own, one, state, whole, resume, callbacks)
            except Diverged as error:
                if recipe.stages[name].cell is None:
                    raise
                log(str(error))
                state[name]["state"] = "diverged"
        if state[name]["state"] == "diverged":
            _write(whole, state)
            continue
        state[name] |= {"state": "finished", "result": read_json(one.folder / "result.json")}
        _write(whole, state)
        gc.collect()  # the next stage needs the memory that reference cycles would hold on to
    here.close()
    for line in _table(chosen, state):
        log(line)
    _summarise(recipe, state, whole)
    return {name: stage["result"] for name, stage in state.items()}


def _summarise(recipe: Recipe, state: Mapping[str, Any], whole: Path) -> None:
    """Write and print each grid's table."""
    from mlx_posttrain.pipeline import summary

    grids: dict[str, dict[str, Cell]] = {}
    for name, stage in recipe.stages.items():
        if stage.cell is not None:
            grids.setdefault(stage.cell.grid, {})[name] = stage.cell
    results = {
        name: stage["result"] | summary.cost(whole / name)
        for name, stage in state.items()
        if stage["result"] is not None
    }
    for name, cells in grids.items():
        for line in ["", *summary.write(whole, name, cells, results)]:
            log(line)
        log(f"the table and its chart are {whole / name}.md and .svg")


def plan(recipe: Recipe) -> list[plans.Plan]:
    """What each stage that trains would take, in order.

    A stage's model that is yet to be made has the size of the one it starts from.
    """
    recipe.output = recipe.output or "runs/pipeline"
    made: dict[str, str] = {}
    planned: list[plans.Plan] = []
    for own in stage_recipes(recipe).values():
        if methods.get(own.method).trains_on is None:
            continue
        own.model = made.get(own.model, own.model)
        for rewards in (getattr(own, "reward", None), getattr(own, "judge", None)):
            for entry in rewards if isinstance(rewards, list) else ():
                entry.model = made.get(entry.model, entry.model)
        assert own.output is not None
        made[own.output] = own.model
        planned += methods.plan(own)
    return planned


def _run_stage(
    name: str,
    own: Any,
    one: runs.Run,
    state: dict[str, Any],
    whole: Path,
    resume: Resume,
    callbacks: Callbacks | None,
) -> None:
    again: Resume = runs.is_run(one.folder) and (resume or True)
    if again:
        _, raw = runs.reopen(one.folder)
        own = parse({**raw, "output": str(one.folder)}, str(one.folder / "recipe.yaml"))
    # a recipe.yaml that a kill cut off would make the folder look used
    for half in one.folder.glob(".tmp-*"):
        half.unlink()
    state[name]["state"] = "running"
    _write(whole, state)
    begun, before = time.monotonic(), state[name]["seconds"]
    try:
        methods.run(own, again, callbacks)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        state[name] |= {
            "state": "interrupted" if stopped else "failed",
            "seconds": before + time.monotonic() - begun,
        }
        with contextlib.suppress(UserError):  # a full disk: the error that says so must come through
            _write(whole, state)
        what = str(error).replace(f"--resume {one.folder}", f"--resume {whole}")
        if stopped:
            raise Interrupted(
                f"stage {name}: {what or f'interrupted: continue with --resume {whole}'}"
            ) from None
        # resumed by itself elsewhere: nothing is wrong with it that advice could mend
        if isinstance(error, lock.RunInUse):
            raise UserError(f"stage {name}: {what}") from None
        if isinstance(error, Diverged):
            raise Diverged(f"stage {name}: {what}{_advice(name, one, whole, state)}") from None
        if isinstance(error, UserError):
            raise UserError(f"stage {name}: {what}{_advice(name, one, whole, state)}") from None
        raise
    state[name]["seconds"] = before + time.monotonic() - begun


def _advice(name: str, one: runs.Run, whole: Path, state: dict[str, Any]) -> str:
    """What to do after a failure; a pipeline whose first stage could not even start is taken away again."""
    if one.folder.exists():
        change = (
            f"to change its settings first, delete {one.folder} and edit stages.{name}.set in "
            f"{whole / 'recipe.yaml'}"
        )
        return f"; continue with --resume {whole} ({change})"
    if any((whole / other).exists() for other in state):
        return f"; correct stages.{name}.set in {whole / 'recipe.yaml'}, then continue with --resume {whole}"
    (whole / "pipeline.json").unlink(missing_ok=True)
    runs.Run(whole).discard()
    return ""


def _check_begun(folder: Path, name: str, state: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError where a stage that was begun has other settings by now: they would mean nothing."""
    if not runs.is_run(folder) or not isinstance(begun := state.get("recipe"), dict):
        return
    # keys that came since have their defaults
    then, now = (parse(raw, f"stage {name}").model_dump(mode="json") for raw in (begun, settings))
    if found := config.differences(then, now):
        raise UserError(
            f"stage {name} was begun with other settings ({config.listed(found)}): put them back, or delete "
            f"{folder} to train the stage anew"
        )


def _state(whole: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    path = whole / "pipeline.json"
    known = read_json(path) if path.is_file() else {}
    state = {}
    for name in names:
        of = known.get(name)
        # an entry that no pipeline wrote says nothing: what a stage is shows in its own folder
        sound = isinstance(of, dict) and "state" in of and isinstance(of.get("seconds"), int | float)
        state[name] = of if sound else {"state": "waiting", "seconds": 0.0, "result": None}
    return state


def _write(whole: Path, state: Mapping[str, Any]) -> None:
    runs.write_text(whole / "pipeline.json", json.dumps(state, indent=2) + "\n")


def _table(chosen: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    width = max(map(len, [*chosen, "stage"]))
    lines = [f"{'stage':{width}}  {'method':8}  {'seconds':>8}  figures"]
    for name, own in chosen.items():
        result = state[name]["result"]
        figures = (
            "diverged"
            if result is None
            else ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float))
        )
        lines.append(f"{name:{width}}  {own.method:8}  {state[name]['seconds']:8.0f}  {figures}")
    return lines


METHOD = Method(
    name="pipeline",
    summary="several recipes in order, each using what earlier ones made",
    Recipe=Recipe,
    run=run,
    plan=plan,
)
