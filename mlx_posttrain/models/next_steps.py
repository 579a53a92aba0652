"""What can be done with a run that has just ended."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_posttrain import config, runs
from mlx_posttrain.config import DataSection
from mlx_posttrain.models.source import saves_language_model

#: Keys of `data` that say how a source is read and what of it is held out.
_OF_A_SOURCE = ("config", "split", "eval_split", "format", "columns", "prompt")


def next_steps(folder: Path) -> list[str]:
    """Return the commands that come next after a finished run.

    A folder below the working directory is named from there, so that a command can be copied.
    """
    folder = folder.absolute()
    name = shlex.quote(_from_here(str(folder)))
    _, recipe = runs.reopen(folder)
    final, stages = folder / "final", list(recipe.get("stages") or ())
    if stages:
        finals = [folder / stage / "final" for stage in stages]
        pages = [f"open {name}/{one.parent.name}/final/report.html" for one in finals if _is_report(one)]
        return [*pages, *([f"mlx-posttrain chat {name}"] if any(map(saves_language_model, finals)) else [])]
    if _is_report(final):
        return [f"open {name}/final/report.html"]
    to = "peft" if (final / "adapter_config.json").is_file() else "hf"
    export = f"mlx-posttrain export {name} --to {to}"
    if not saves_language_model(final):
        return [_ppo(recipe, _from_here(str(folder))), export]
    return [f"mlx-posttrain chat {name}", f"mlx-posttrain eval {name}", export]


def _ppo(recipe: Mapping[str, Any], reward: str) -> str:
    """PPO from the model that a reward model began as, on the prompts of its pairs."""
    data, fields = recipe.get("data") or {}, DataSection.model_fields
    given = [f"model={_typed(_from_here(str(recipe.get('model'))))}", f"reward=[{{model: {_typed(reward)}}}]"]
    one = isinstance(data.get("source"), str)  # not a mixture
    given += [f"data.source={_typed(_from_here(data['source']))}"] if one else []
    for key in (*_OF_A_SOURCE, "system") if one else ("system",):
        value = data.get(key, fields[key].default)
        if value not in (None, {}, fields[key].default):
            given.append(f"data.{key}={_typed(value)}")
    if isinstance(data.get("template"), str):
        given.append(f"data.template={data['template']}")
    return shlex.join(["mlx-posttrain", "run", "07_ppo", *given])


def _typed(value: Any) -> str:
    """A value as a setting has it: JSON, without the quotes of a text that is one without them."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./~+-]+", value)
    if plain and config.settings([f"x={value}"])["x"] == value:
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _from_here(path: str) -> str:
    """A path below the working directory as it is named from there; any other text as it is."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _is_report(final: Path) -> bool:
    return (final / "report.html").is_file()
