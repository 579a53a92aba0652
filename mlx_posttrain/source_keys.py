"""What a shipped recipe says about its own rows does not hold for rows from elsewhere.

``run 03_lora data.source=mine.csv`` means all of mine.csv, read for what it is: the 200 rows of Alpaca that
the recipe takes, its configuration, format, splits and system prompt are left behind. What the user sets
always holds, and what a user's own recipe says is the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_posttrain.console import log

if TYPE_CHECKING:
    from mlx_posttrain.config import DataSection

#: Keys of `data` that say how the rows of one source are found and read, and what stands before each of them.
DESCRIBING = ("split", "config", "format", "families", "columns", "eval_split", "system")
#: Keys of `data` that say how many of them are taken. Generated rows have no number of their own.
CUTTING = ("limit", "shuffle", "holdout", "clean.keep")


def is_shipped(path: Path) -> bool:
    """Whether a recipe is one of those that come with the package."""
    from mlx_posttrain import config

    return path.resolve() in [shipped.resolve() for shipped in config.shipped().values()]


def are_shipped(context: Any) -> bool:
    """Whether the stages of a pipeline are those of a shipped one, which mean what they say.

    context: of the validation, see config.parse.
    """
    from mlx_posttrain import config

    folder = (context or {}).get("folder")
    return folder is not None and Path(folder).resolve() == config.shipped()["demo"].parent.resolve()


def named(settings: Mapping[str, Any]) -> str | None:
    """The source that nested settings name, if they do."""
    data = settings.get("data")
    source = data.get("source") if isinstance(data, dict) else None
    return source if isinstance(source, str) else None


def without_them(
    raw: dict[str, Any], source: str, *, limited: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A shipped recipe's keys without those about its own source, where ``source`` is another, and these.

    raw: nested keys; a changed copy is returned. A recipe keeps what it says where it has no data of its own
    but the name of a file to come (``texts.jsonl``). limited: the user sets a limit, so that the recipe's
    ``shuffle`` has a meaning.
    """
    from mlx_posttrain.data import sources

    own = named(raw)
    if own is None or own == source or not (own.startswith("embedded/") or sources.is_hub_id(own)):
        return raw, {}
    left, dropped = _copy(raw["data"]), {}
    for key in _keys(source, limited):
        section, last = _holder(left, key)
        if section is not None and section.get(last):
            dropped[key] = section.pop(last)
    return {**raw, "data": left}, dropped


def say(
    name: str, own: str | None, source: str | None, dropped: Mapping[str, Any], data: DataSection
) -> None:
    """Print which keys of the recipe ``name`` were ``dropped``, and which rows its ``data`` holds out now."""
    from mlx_posttrain.data import sources

    told = ", ".join(f"data.{key}={_short(value)}" for key, value in dropped.items())
    verbs = ("belongs", "is") if len(dropped) == 1 else ("belong", "are")
    line = f"{name}: {told} {verbs[0]} to {own} and {verbs[1]} not used for {source}"
    aside = data.eval_split is None and source not in sources.GENERATED
    if aside and {"holdout", "eval_split"} & set(dropped):
        share = f"{data.holdout:.0%}" if data.holdout < 1 else f"{data.holdout:g}"
        line += f", of which {share} of the rows are held out (data.holdout={data.holdout:g})"
    log(line)


def defaults(source: str, *, limited: bool = False) -> dict[str, Any]:
    """The keys of `data` about a source at their defaults, nested: they hide those of the layers below."""
    from mlx_posttrain.config import DataSection

    fields = DataSection.model_fields
    return {
        key: fields[key].get_default(call_default_factory=True)
        for key in _keys(source, limited)
        if "." not in key
    }


def _keys(source: str, limited: bool) -> tuple[str, ...]:
    from mlx_posttrain.data import sources

    cutting = () if source in sources.GENERATED else CUTTING
    return DESCRIBING + tuple(key for key in cutting if not (limited and key == "shuffle"))


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}


def _holder(data: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    section, dot, last = key.rpartition(".")
    found = data.get(section) if dot else data
    return (found if isinstance(found, dict) else None), last


def _short(value: Any) -> str:
    if isinstance(value, str) and " " in value:
        return repr(value if len(value) <= 40 else f"{value[:39]}…")
    return str(value) if not isinstance(value, list | dict) else "..."
