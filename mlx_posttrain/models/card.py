"""A run's model card: what it started from, what it was trained on, and what came out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.config import read_yaml
from mlx_posttrain.convert import card
from mlx_posttrain.convert.files import read_json
from mlx_posttrain.models.source import Source, is_hub_id
from mlx_posttrain.yaml_text import MAX_OF_A_RUN

#: Keys of a recipe that are in a card's other parts, or say nothing of how a model was trained.
NOT_THE_METHOD = (
    *("method", "seed", "description", "model", "engine", "output"),
    *("log", "data", "sample", "mixture"),
)

#: An absolute path with its last part: alone, in a command or a list, but not behind the colon of an address.
_PART = r"[^\s'\",\]})/]+"
_ABSOLUTE = re.compile(rf"(?<![^\s='\"\[{{(,])(?:~/(?:{_PART}/)*|/(?:{_PART}/)+)({_PART})/?")


def run_card(run: Path) -> str:
    """The card of a run whose ``final/`` is about to be written: a run that has it must have its card."""
    _, recipe = runs.reopen(run)
    return model_card(Source(run / "final", None, recipe), run)


def model_card(
    source: Source,
    run: Path,
    to: str = "hf",
    merged: bool = False,
    how_to_use: Callable[[str], str] | None = None,
) -> str:
    """The run's README: base, data, method, figures and the command that made it.

    Without absolute paths, which say nothing on another machine. how_to_use: from the base's name, Markdown.
    """
    raw: dict[str, Any] = portable(source.recipe or {})
    base = portable(base_name(source))
    result = run / "result.json"
    figures = read_json(result) if result.is_file() else {}
    environment = _environment(run)
    adapter = raw.get("adapter") or {}
    sources = raw.get("data", {}).get("sources")
    named = isinstance(sources, list) and all(isinstance(one, dict) and "source" in one for one in sources)
    sources = sources if named else []
    method = {"method": raw.get("method", "unknown"), "seed": raw.get("seed")}
    method |= {"template": raw.get("data", {}).get("template")}
    for section, value in raw.items():
        if section not in NOT_THE_METHOD:
            method |= _flat(section, value)
    return card.model_card(
        {
            "name": run.name,
            "base_model": base,
            "usage": how_to_use and how_to_use(base),
            "datasets": [one["source"] for one in sources] or raw.get("data", {}).get("source"),
            "library_name": {"peft": "peft", "mlx-lm": "mlx", "gguf": "gguf"}.get(to, "transformers"),
            "description": raw.get("description") or f"A model made by {raw.get('method', 'post-training')}.",
            "data": {
                **{
                    k: v for k, v in raw.get("data", {}).items() if k != "sources" and v not in (None, {}, [])
                },
                **_sources(sources, raw.get("mixture")),
            },
            "method": {k: v for k, v in method.items() if v is not None},
            "figures": {
                f"held-out {k.replace('/', ' of ')}"
                if k.partition("/")[0] in ("loss", "nll", "kl")
                else k.replace("_", " "): v
                for k, v in figures.items()
            },
            "command": portable(environment.get("command")),
            "versions": environment.get("versions"),
            "tags": [t for t in (raw.get("method"), adapter.get("kind"), "merged" if merged else None) if t],
        }
    )


def portable(value: Any) -> Any:
    """A value with every absolute path in it cut to its last part."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return _ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value


def _sources(sources: Sequence[Mapping[str, Any]], counted: Any) -> dict[str, str]:
    """What a mixture is made of: each source's settings and, as the run counted them, its rows."""
    rows = list(counted.items()) if isinstance(counted, dict) else []
    found = {}
    for number, source in enumerate(sources):
        settings = {k: v for k, v in source.items() if v not in (None, {}, [])}
        name, numbers = rows[number] if len(rows) == len(sources) else (f"source {number + 1}", {})
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        if numbers:
            text += f"; {numbers['train']:,} rows trained on, {numbers['held_out']:,} held out"
        found[name] = text
    return found


def _flat(key: str, value: Any) -> dict[str, Any]:
    """A section's settings by dotted key; lists as JSON."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _flat(f"{key}.{name}", inner).items()}
    return {key: json.dumps(value) if isinstance(value, list) else value}


def base_name(source: Source) -> str:
    """What others should load as the base: by its hub id where it has one, else the folder."""
    if source.base_id is not None:
        return source.base_id
    named = str((source.recipe or {}).get("model", ""))
    if named and is_hub_id(named):
        return named
    return str(source.folder) if source.adapter is not None or not named else named


def _environment(run: Path) -> dict[str, Any]:
    path = run / "recipe.yaml"
    found = read_yaml(path, MAX_OF_A_RUN).get("environment") if path.is_file() else None
    if not isinstance(found, dict):
        return {}
    kinds = {"command": str, "versions": dict}
    return {key: found[key] for key, kind in kinds.items() if isinstance(found.get(key), kind)}
