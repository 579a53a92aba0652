"""Grids: one stage of a pipeline as a run for every combination of some settings.

    ppo:
      recipe: demo_ppo
      set: {model: "{policy}"}
      grid: {kl.beta: [0.05, 0.2], seed: [0, 1, 2]}

stands for the six stages ``ppo_beta_0_05_seed_0``, ``ppo_beta_0_05_seed_1`` and so on. ``{ppo}``, alone in a
mapping or a list of a later stage, stands for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from pydantic import Field

from mlx_posttrain import config
from mlx_posttrain.errors import UserError
from mlx_posttrain.yaml_text import as_written

MOST = 1000  # stages of one grid


class Cell(config.Section):
    """A stage's place in a grid."""

    grid: str = Field(description="the stage's name before it was spread out")
    at: dict[str, Any] = Field(description="its own value of each of the grid's keys")
    metric: str | None = Field(None, description="figure of result.json that the table compares")


def axes(overrides: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    """The settings that have several values, ``train.lr=1e-5,1e-4``, by key; and the other settings.

    A comma within brackets or quotes belongs to a value. Raises UserError for an empty value.
    """
    grid: dict[str, list[Any]] = {}
    fixed = []
    for setting in overrides:
        key, equals, text = setting.partition("=")
        parts = _split(text)
        if not equals or len(parts) < 2:
            fixed.append(setting)
            continue
        if not all(part.strip() for part in parts):
            raise UserError(f"{setting!r} has an empty value between commas")
        grid[key] = [config.settings([f"{key}={part.strip()}"])[key] for part in parts]
    return grid, fixed


def _split(text: str) -> list[str]:
    """The text's parts between the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
            if character == "," and not depth:
                parts.append("")
                continue
        parts[-1] += character
    return parts


def expand(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The stages with every grid spread out, in order: the last key's values change first.

    Raises ValueError for a grid that is none, or two runs of one name.
    """
    found: dict[str, Any] = {}
    groups: dict[str, dict[str, str]] = {}  # grid: {its stages: their labels}
    for name, stage in stages.items():
        if isinstance(stage, dict):
            stage = {key: _all_of(value, groups) for key, value in stage.items()}
        grid = stage.get("grid") if isinstance(stage, dict) else None
        if grid is None:
            own = {name: stage}
        else:
            own, groups[name] = _spread(name, stage, grid)
        for key in own:
            if key in found:
                raise ValueError(f"two stages are called {key}")
        found |= own
    return found


def _spread(name: str, stage: dict[str, Any], grid: Any) -> tuple[dict[str, Any], dict[str, str]]:
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"stages.{name}.grid: give keys with lists of values, for example {{seed: [0, 1]}}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"stages.{name}.grid.{key}: give a list of values")
    size = 1
    for values in grid.values():
        size *= len(values)
    if size > MOST:
        raise ValueError(f"stages.{name}.grid has {size:,} combinations; at most {MOST:,} are run")
    short = _short([str(key) for key in grid])
    stages, labels = {}, {}
    for numbers in product(*(range(len(values)) for values in grid.values())):
        at = {str(key): values[i] for (key, values), i in zip(grid.items(), numbers, strict=True)}
        texts = [
            f"{short[key]}={value_text(value, i)}"
            for (key, value), i in zip(at.items(), numbers, strict=True)
        ]
        own = re.sub(r"\W+", "_", "_".join([name, *texts]))
        if own in stages:
            raise ValueError(f"stages.{name}.grid: two runs are called {own}")
        of = {"grid": name, "at": at, "metric": stage.get("metric")}
        rest = {key: value for key, value in stage.items() if key not in ("grid", "metric")}
        settings = stage.get("set") or {}
        stages[own] = {
            **rest,
            "set": {**settings, **at} if isinstance(settings, dict) else settings,
            "cell": of,
        }
        labels[own] = " ".join(texts)
    return stages, labels


def _short(keys: list[str]) -> dict[str, str]:
    """Each key's last part, or all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: own if last.count(own) == 1 else key for key, own in zip(keys, last, strict=True)}


def value_text(value: Any, number: int = 0) -> str:
    """A value for a name or a table: lists and mappings by their number in the grid."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(number) if isinstance(value, dict | list) else str(value)


def _all_of(value: Any, groups: Mapping[str, Mapping[str, str]]) -> Any:
    """The value with each ``{GRID}`` that stands alone in a mapping or a list as all the grid's runs."""
    if isinstance(value, dict):
        entries: dict[Any, Any] = {}
        for key, item in value.items():
            group = groups.get(_name_in_braces(item))
            if group is None:
                entries[key] = _all_of(item, groups)
            else:
                entries |= {f"{key} {label}": f"{{{stage}}}" for stage, label in group.items()}
        return as_written(value, entries)
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            group = groups.get(_name_in_braces(item))
            items += [_all_of(item, groups)] if group is None else [f"{{{stage}}}" for stage in group]
        return items
    return value


def _name_in_braces(value: Any) -> str:
    """``ppo`` of ``"{ppo}"``, or of ``{ppo}`` without quotes, which YAML reads as a mapping; else ""."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value.values())) is None:
        return str(next(iter(value)))
    found = re.fullmatch(r"\{(\w+)\}", value) if isinstance(value, str) else None
    return found[1] if found else ""
