"""What a pipeline's recipe may say, each stage's own recipe made from it, and a sweep as a pipeline."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from mlx_posttrain import config, methods, source_keys
from mlx_posttrain.convert.files import home
from mlx_posttrain.errors import UserError
from mlx_posttrain.pipeline.grid import Cell, axes, expand
from mlx_posttrain.yaml_text import Written, as_written

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
    grid: dict[str, list[Any]] | None = Field(
        None,
        description="a run for each combination of these values: {train.lr: [1e-5, 1e-4], seed: [0, 1, 2]}; "
        "{NAME} alone in a later stage's mapping or list: all of them",
    )
    metric: str | None = Field(
        None, description="with grid: the figure of result.json that is compared; null: the first"
    )
    cell: Cell | None = Field(None, description="set by the pipeline: a run's place in a grid")


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
            if not re.fullmatch(r"\w+", name) or len(name.encode()) > 100 or name in cls.model_fields:
                raise ValueError(
                    f"stage {config.short(name)}: a name has letters, digits and underscores, at most 100 "
                    "bytes, and is no key of a pipeline"
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
                        value = merged(
                            {"data": source_keys.defaults(source, limited="limit" in value["data"])}, value
                        )
                    stage["set"] = merged(_nested(stage.get("set") or {}), value)
                    if isinstance(grid := stage.get("grid"), dict):
                        stage["grid"] = {axis: _given(value, axis, every) for axis, every in grid.items()}
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
        return {**rest, "stages": expand(stages)}

    @model_validator(mode="after")
    def _checked(self, info: ValidationInfo) -> Recipe:
        """Read each stage's recipe, check it with its settings, and keep it whole.

        A resumed pipeline no longer needs the file.
        """
        folder = (info.context or {}).get("folder")
        earlier: list[str] = []
        notices: list[tuple[Any, ...]] = []
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
                left_out: tuple[Any, ...] | None = None
                if isinstance(stage.recipe, str):
                    where += f" ({Path(stage.recipe).name})"
                    named, stage.recipe = stage.recipe, _read(stage.recipe, folder)
                    source = source_keys.named(stage.set)
                    if source and named in config.shipped() and not source_keys.are_shipped(info.context):
                        own = source_keys.named(stage.recipe)
                        stage.recipe, dropped = source_keys.without_them(
                            stage.recipe, source, limited="limit" in stage.set["data"]
                        )
                        left_out = (own, source, dropped) if dropped else None
                whole = parse(merged(stage.recipe, stage.set), where)
                if left_out is not None:
                    notices.append((where, *left_out, whole.data))
            except UserError as error:
                text = str(error)
                raise ValueError(text if text.startswith("stage ") else f"stage {name}: {text}") from None
            stage.set = config.as_meant(stage.set, type(whole))
            stage.recipe = whole.model_dump(mode="json", exclude=set(_FOR_ALL))
            earlier.append(name)
        for notice in notices:
            source_keys.say(*notice)
        return self


def _read(name: str, folder: Path | None) -> dict[str, Any]:
    beside = folder / name if folder is not None else Path(name)
    raw = config.read_yaml(beside if beside.is_file() else config.find_recipe(name))
    return {key: value for key, value in raw.items() if key not in (*config.FACTS, "output")}


def parse(raw: dict[str, Any], where: str) -> Any:
    if "stages" in raw:
        raise UserError(f"{where}: a pipeline cannot be a stage of another")
    return methods.parse_recipe(raw, where)


def sweep(name: str, overrides: list[str], metric: str | None = None) -> Recipe:
    """The pipeline that runs a recipe for every combination of the settings that have several values.

    overrides: as on the command line; ``train.lr=1e-5,1e-4`` is two values. metric: the figure of result.json
    that the table compares; None: the first.

    Raises UserError where no setting has several values, for a recipe that is a pipeline, and as
    methods.load_recipe.
    """
    values, fixed = axes(overrides)
    if not values:
        raise UserError(
            "nothing to sweep: give a key several values, for example train.lr=1e-5,1e-4 seed=0,1,2"
        )
    for key in ("output", "engine"):
        if key in values:
            raise UserError(f"{key} has one value for the whole sweep")
    settings = config.settings(fixed)
    path = config.find_recipe(name)
    shipped = source_keys.is_shipped(path)
    if "stages" in config.read_yaml(path):
        raise UserError(f"{path.name} is a pipeline: copy it, and give one of its stages a grid")
    stage = re.sub(r"\W+", "_", path.stem)
    stage = f"{stage}_run" if stage in Recipe.model_fields else stage
    raw: dict[str, Any] = {
        "method": "pipeline",
        "description": f"{path.stem} with {', '.join(values)} varied",
        **{key: settings.pop(key) for key in ("output", "engine") if key in settings},
        "stages": {
            stage: {
                "recipe": path.stem if shipped else str(path),
                "set": settings,
                "grid": values,
                "metric": metric,
            }
        },
    }
    found: Recipe = methods.parse_recipe(raw, path.name, output=f"runs/sweep-{path.stem}")
    return found


# Settings


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; of two settings of one key the later holds."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        section, last = config.holder(found, str(key))
        if isinstance(value, dict):
            value = merged(section.get(last), as_written(value, _nested(value)))
        section[last] = value
    return found


def _given(value: dict[str, Any], axis: Any, values: Any) -> Any:
    """A grid's values of a key; where settings for the whole grid have the key, theirs alone."""
    found: Any = value
    for part in str(axis).split("."):
        if not isinstance(found, dict) or part not in found:
            return values
        found = found[part]
    return [found]


def merged(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``; a list's entries are named by their numbers, as in config.holder."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{k: merged(below.get(k), v) for k, v in above.items()}}
    numbers = {str(i) for i in range(len(below))} if isinstance(below, list) else set()
    if isinstance(above, dict) and above and set(above) <= numbers:
        return [merged(entry, above[str(i)]) if str(i) in above else entry for i, entry in enumerate(below)]
    return above


def _as_text(value: Any, names: Mapping[str, Any]) -> Any:
    """``{sft}`` without quotes, which YAML reads as a mapping, as the text that was meant."""
    if isinstance(value, dict):
        name = next(iter(value), None)
        if len(value) == 1 and name in names and value[name] is None:
            return f"{{{name}}}"
        return as_written(value, {k: _as_text(v, names) for k, v in value.items()})
    return [_as_text(v, names) for v in value] if isinstance(value, list) else value


def _references(value: Any, key: str = "") -> list[str]:
    if isinstance(value, Written):
        return _REFERENCE.findall(value.text)
    if isinstance(value, dict):
        return [name for k, v in value.items() if not _is_wording(k, key) for name in _references(v, k)]
    if isinstance(value, list):
        return [name for v in value for name in _references(v, key)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _filled(value: Any, folder: Path, names: Collection[str], key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: v if _is_wording(k, key) else _filled(v, folder, names, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, folder, names, key) for v in value]
    return (
        _REFERENCE.sub(lambda m: str(folder / m[1]) if m[1] in names else m[0], value)
        if isinstance(value, str)
        else value
    )


def _is_wording(key: str, within: str) -> bool:
    """Whether a key is data.prompt or a source's prompt, in which braces are columns."""
    return key == "prompt" and within in ("data", "sources")


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
        found[name] = parse(merged(_filled(stage.recipe, folder, recipe.stages), given), f"stage {name}")
    return found
