"""A pipeline: several recipes in order, each using what earlier ones made.

    stages:
      sft:    {recipe: 01_sft}
      reward: {recipe: 07_reward, set: {model: "{sft}"}}
      ppo:    {recipe: 07_ppo, set: {model: "{sft}", reward: [{model: "{reward}"}]}}

``{NAME}`` stands for that stage's run directory, ``output/NAME``. Every stage is an ordinary run: it can be looked at, exported and used
alone. All recipes are checked before the first stage starts. ``--resume`` skips finished stages and continues the one that was cut off.
"""

from __future__ import annotations

import difflib
import json
import re
import time
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from mlx_posttrain import recipe as recipes
from mlx_posttrain import runs
from mlx_posttrain.errors import UserError
from mlx_posttrain.progress import Interrupted, say

_REFERENCE = re.compile(r"\{(\w+)\}")


class StageSection(recipes.Section):
    """One stage."""

    recipe: str = Field(description="a shipped recipe's name or a YAML file")
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of that recipe, dotted or nested; {NAME}: that stage's run directory"
    )


class Recipe(recipes.Section):
    """Several recipes in order. ``STAGE.key=value`` overrides a key of one stage."""

    method: Literal["pipeline"] = Field(description="pipeline: several recipes in order")
    description: str = Field("", description="what this pipeline shows")
    engine: Literal["auto", "mlx", "torch"] = Field("auto", description="engine of all stages")
    output: str | None = Field(None, description="directory with one run directory per stage; null: runs/<recipe's name>")
    seed: int = Field(0, ge=0, description="seed of all stages that do not set their own")
    stages: dict[str, StageSection] = Field(min_length=1, description="stages by name, in order")

    @model_validator(mode="before")
    @classmethod
    def _overrides(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("stages"), dict):
            return raw
        stages = {name: dict(stage) if isinstance(stage, dict) else stage for name, stage in raw["stages"].items()}
        rest = {}
        for key, value in raw.items():
            if key in stages and isinstance(value, dict) and isinstance(stages[key], dict):
                stages[key]["set"] = _merged(_nested(stages[key].get("set") or {}), _nested(value))
            elif key != "stages" and key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), [*stages, *cls.model_fields], n=1, cutoff=0.5)
                raise ValueError(
                    f"unknown key or stage '{key}'" + (f"; did you mean '{near[0]}'?" if near else f"; stages: {', '.join(stages)}")
                )
            else:
                rest[key] = value
        return {**rest, "stages": stages}

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"stage {name!r}: a name has letters, digits and underscores")
            for used in _references(stage.set):
                if used not in earlier:
                    what = "comes later or is itself" if used in self.stages else "is no stage"
                    raise ValueError(f"stage {name} uses {{{used}}}, which {what}; before it: {', '.join(earlier) or 'nothing'}")
            earlier.append(name)
        return self


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = _merged(section.get(last), _nested(value)) if isinstance(value, dict) else value
    return found


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{k: _merged(below.get(k), v) for k, v in above.items()}}
    return above


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for v in value.values() for name in _references(v)]
    if isinstance(value, list):
        return [name for v in value for name in _references(v)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, folder) for v in value]
    return _REFERENCE.sub(lambda m: str(folder / m[1]), value) if isinstance(value, str) else value


def stage_recipes(recipe: Recipe) -> dict[str, Any]:
    """Each stage's checked recipe by name. Raises UserError naming stage and key."""
    from mlx_posttrain import methods

    assert recipe.output is not None
    folder, found = Path(recipe.output), {}
    for name, stage in recipe.stages.items():
        path = recipes.find_recipe(stage.recipe)
        raw = recipes.read_yaml(path)
        for fact in ("environment", "untemplated"):
            raw.pop(fact, None)
        own = _nested(_filled(stage.set, folder))
        raw = _merged(raw, {"seed": recipe.seed, **own, "engine": recipe.engine, "output": str(folder / name)})
        if raw.get("method") == "pipeline":
            raise UserError(f"stage {name}: a pipeline cannot be a stage of another")
        found[name] = recipes.parse(raw, methods.get(str(raw.get("method"))).Recipe, f"stage {name} ({path.name})")
    return found


def run(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Run all stages that have no result yet; returns {stage: its figures}. Raises UserError as the stages' methods do."""
    from mlx_posttrain import methods

    assert recipe.output is not None
    for stage in recipe.stages.values():  # a resumed pipeline may be called from another folder
        if Path(stage.recipe).is_file():
            stage.recipe = str(Path(stage.recipe).absolute())
    recipe.output = str(Path(recipe.output).expanduser().absolute())
    chosen = stage_recipes(recipe)
    whole = Path(recipe.output)
    state: dict[str, Any] = {}
    if resume:
        if (whole / "pipeline.json").is_file():
            state = json.loads((whole / "pipeline.json").read_text())
        if all(runs.Run(whole / name).finished for name in chosen):
            raise UserError(f"{whole} is finished: there is nothing to resume")
    else:
        runs.start(whole, recipe)  # type: ignore[arg-type]
    for number, (name, own) in enumerate(chosen.items(), 1):
        one = runs.Run(whole / name)
        if one.finished:
            say(f"stage {number} of {len(chosen)}, {name}: finished before")
            continue
        say(f"stage {number} of {len(chosen)}, {name}: {own.description or own.method}")
        begun = time.monotonic()
        again = runs.is_run(one.folder)
        if again:
            own = recipes.parse(_unfinished(one), methods.get(own.method).Recipe, str(one.folder / "recipe.yaml"))
        try:
            methods.get(own.method).run(own, resume=again)
        except Interrupted as stop:
            raise Interrupted(f"stage {name} was interrupted: continue the pipeline with --resume {whole} ({stop})") from None
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from None
        state[name] = {"seconds": time.monotonic() - begun, "result": _result(one)}
        runs.write_text(whole / "pipeline.json", json.dumps(state, indent=2) + "\n")
    results = {name: _result(runs.Run(whole / name)) for name in chosen}
    for name, figures in results.items():
        say(f"{name:12} " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float)))
    return results


def _unfinished(one: runs.Run) -> dict[str, Any]:
    raw = yaml.safe_load((one.folder / "recipe.yaml").read_text(encoding="utf-8"))
    for fact in ("environment", "untemplated"):
        raw.pop(fact, None)
    return {**raw, "output": str(one.folder)}


def _result(one: runs.Run) -> dict[str, Any]:
    path = one.folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else {}
