"""A pipeline: several recipes in order, each using what earlier ones made.

    stages:
      sft:    {recipe: 01_sft}
      reward: {recipe: 07_reward, set: {model: "{sft}"}}
      ppo:    {recipe: 07_ppo, set: {model: "{sft}", reward: [{model: "{reward}"}]}}

``{NAME}`` stands for that stage's run directory, ``output/NAME``, in ``set`` and in a recipe that is written
out in the pipeline. Every stage is an ordinary run: it can be looked at, exported and used alone. All recipes
are read and checked when the pipeline is, so a mistyped key in the last stage is found before the first one
starts. ``pipeline.json`` says how far each stage is (waiting, running, finished, interrupted, failed), how
long it took and what came out. ``--resume`` skips finished stages and continues the one that was cut off.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from mlx_posttrain import config, engines, methods, runs, source_keys
from mlx_posttrain.console import Interrupted, log
from mlx_posttrain.convert.files import home, read_json
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.runs import lock
from mlx_posttrain.training.loop import Callbacks
from mlx_posttrain.training.method import Method, Resume

_REFERENCE = re.compile(r"\{(\w+)\}")
_FOR_ALL = ("engine", "seed", "output")  # what the pipeline gives every stage


class StageSection(config.Section):
    """One stage."""

    recipe: str | dict[str, Any] = Field(
        description="a shipped recipe's name, a YAML file (looked for beside this one first), or its keys"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of that recipe, dotted or nested; {NAME} in a text: that stage's run directory",
    )


class Recipe(config.Section):
    """Several recipes in order. ``STAGE.key=value`` overrides a key of one stage."""

    method: Literal["pipeline"] = Field(description="pipeline: several recipes in order")
    description: str = Field("", description="what this pipeline shows")
    engine: Literal["auto", "mlx", "torch"] = Field(
        "auto", description="engine of all stages whose `set` names none"
    )
    output: str | None = Field(
        None, description="directory with one run directory per stage; null: runs/<recipe's name>"
    )
    seed: int = Field(0, ge=0, description="seed of all stages whose `set` names none")
    stages: dict[str, StageSection] = Field(min_length=1, description="stages by name, in order")

    @model_validator(mode="before")
    @classmethod
    def _overrides(cls, raw: Any, info: ValidationInfo) -> Any:
        """Move ``STAGE.key=value`` of the command line into that stage's ``set``."""
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
            return raw
        stages = {
            str(name): dict(stage) if isinstance(stage, dict) else stage
            for name, stage in raw["stages"].items()
        }
        rest = {}
        for name, stage in stages.items():
            if not re.fullmatch(r"\w+", name) or name in cls.model_fields:
                raise ValueError(
                    f"stage {name!r}: a name has letters, digits and underscores and is no key of a pipeline"
                )
            for key in stage if isinstance(stage, dict) else ():
                if key not in StageSection.model_fields:
                    raise ValueError(
                        f"unknown key 'stages.{name}.{key}'; keys of the stage's recipe stand "
                        f"under 'stages.{name}.set'"
                    )
        for key, value in raw.items():
            if key in stages:
                stage = stages[key]
                if not isinstance(value, dict):
                    raise ValueError(
                        f"'{key}' is a stage: write {key}.key=value, for example {key}.train.lr=1e-5"
                    )
                if isinstance(stage, dict) and isinstance(stage.get("set") or {}, dict):
                    value = _nested(value)
                    source = source_keys.named(value)
                    if source and source_keys.are_shipped(info.context):
                        value = _merged(
                            {"data": source_keys.defaults(source, limited="limit" in value["data"])}, value
                        )
                    stage["set"] = _merged(_nested(stage.get("set") or {}), value)
            elif key in cls.model_fields:
                rest[key] = value
            else:
                near = difflib.get_close_matches(str(key), [*stages, *cls.model_fields], n=1, cutoff=0.5)
                hint = (
                    f"did you mean '{near[0]}'?"
                    if near
                    else f"stages: {', '.join(stages)}; keys: {', '.join(cls.model_fields)}"
                )
                raise ValueError(f"unknown key or stage '{key}'; {hint}")
        return {**rest, "stages": stages}

    @model_validator(mode="after")
    def _checked(self, info: ValidationInfo) -> Recipe:
        """Read each stage's recipe, check it with its settings, and keep it whole.

        A resumed pipeline no longer needs the file.
        """
        folder = (info.context or {}).get("folder")
        earlier: list[str] = []
        for name, stage in self.stages.items():
            stage.set = {key: _as_text(value, self.stages) for key, value in _nested(stage.set).items()}
            if isinstance(stage.recipe, dict):
                stage.recipe = {key: _as_text(value, self.stages) for key, value in stage.recipe.items()}
            # In a recipe's own texts braces may be anything else; in `set` they are a reference.
            for used in [
                *_references(stage.set),
                *(name for name in _references(stage.recipe) if name in self.stages),
            ]:
                if used not in earlier:
                    what = "comes later or is itself" if used in self.stages else "is no stage"
                    raise ValueError(
                        f"stage {name} uses {{{used}}}, which {what}; before it: "
                        f"{', '.join(earlier) or 'nothing'}"
                    )
            if "output" in stage.set:
                raise ValueError(
                    f"stage {name}: its output is the pipeline's output/{name}: leave it out, "
                    "or set output for all"
                )
            try:
                where = f"stage {name}"
                if isinstance(stage.recipe, str):
                    where += f" ({Path(stage.recipe).name})"
                    named, stage.recipe = stage.recipe, _read(stage.recipe, folder)
                    source = source_keys.named(stage.set)
                    if source and named in config.shipped() and not source_keys.are_shipped(info.context):
                        stage.recipe = source_keys.without_them(
                            stage.recipe, source, where, limited="limit" in stage.set["data"]
                        )
                whole = _parsed(_merged(stage.recipe, stage.set), where)
            except UserError as error:
                text = str(error)
                raise ValueError(text if text.startswith("stage ") else f"stage {name}: {text}") from None
            stage.recipe = whole.model_dump(mode="json", exclude=set(_FOR_ALL))
            earlier.append(name)
        return self


def _read(name: str, folder: Path | None) -> dict[str, Any]:
    beside = folder / name if folder is not None else Path(name)
    raw = config.read_yaml(beside if beside.is_file() else config.find_recipe(name))
    return {key: value for key, value in raw.items() if key not in (*config.FACTS, "output")}


def _parsed(raw: dict[str, Any], where: str) -> Any:
    if "stages" in raw:
        raise UserError(f"{where}: a pipeline cannot be a stage of another")
    return methods.parse_recipe(raw, where)


# Settings


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; of two settings of one key the later holds."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        section, last = config.holder(found, str(key))
        section[last] = _merged(section.get(last), _nested(value)) if isinstance(value, dict) else value
    return found


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{k: _merged(below.get(k), v) for k, v in above.items()}}
    return above


def _as_text(value: Any, names: Mapping[str, Any]) -> Any:
    """``{sft}`` without quotes, which YAML reads as a mapping, as the text that was meant."""
    if isinstance(value, dict):
        name = next(iter(value), None)
        if len(value) == 1 and name in names and value[name] is None:
            return f"{{{name}}}"
        return {k: _as_text(v, names) for k, v in value.items()}
    return [_as_text(v, names) for v in value] if isinstance(value, list) else value


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for v in value.values() for name in _references(v)]
    if isinstance(value, list):
        return [name for v in value for name in _references(v)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _filled(value: Any, folder: Path, names: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, folder, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, folder, names) for v in value]
    return (
        _REFERENCE.sub(lambda m: str(folder / m[1]) if m[1] in names else m[0], value)
        if isinstance(value, str)
        else value
    )


def stage_recipes(recipe: Recipe) -> dict[str, Any]:
    """Each stage's own recipe by name, with run directories in place of ``{NAME}``."""
    assert recipe.output is not None
    folder, found = home(recipe.output).absolute(), {}
    for name, stage in recipe.stages.items():
        given = {
            "engine": recipe.engine,
            "seed": recipe.seed,
            **_filled(stage.set, folder, recipe.stages),
            "output": str(folder / name),
        }
        found[name] = _parsed(_merged(_filled(stage.recipe, folder, recipe.stages), given), f"stage {name}")
    return found


# The run


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
    settings = {name: _merged(stage.recipe, stage.set) for name, stage in recipe.stages.items()}
    for name in chosen:
        _check_begun(whole / name, name, state[name], settings[name])
    if all(stage["state"] == "finished" for stage in state.values()):
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
        log(
            f"stage {number} of {len(chosen)}, {name}: "
            f"{'finished before' if one.finished else own.description or own.method}"
        )
        if not one.finished:
            state[name]["recipe"] = settings[name]
            _run_stage(name, own, one, state, whole, resume, callbacks)
        state[name] |= {"state": "finished", "result": read_json(one.folder / "result.json")}
        _write(whole, state)
        gc.collect()  # the next stage needs the memory that reference cycles would hold on to
    here.close()
    for line in _table(chosen, state):
        log(line)
    return {name: stage["result"] for name, stage in state.items()}


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
        own = _parsed({**raw, "output": str(one.folder)}, str(one.folder / "recipe.yaml"))
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
    then, now = (_parsed(raw, f"stage {name}").model_dump(mode="json") for raw in (begun, settings))
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
        figures = ", ".join(f"{k} {v:.4g}" for k, v in state[name]["result"].items() if isinstance(v, float))
        lines.append(f"{name:{width}}  {own.method:8}  {state[name]['seconds']:8.0f}  {figures}")
    return lines


METHOD = Method(
    name="pipeline",
    summary="several recipes in order, each using what earlier ones made",
    Recipe=Recipe,
    run=run,
    plan=plan,
)
