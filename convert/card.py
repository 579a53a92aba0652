"""The README.md of an exported model or adapter: a model card with the hub's front matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# A hub id, but not a file ("data/rows.jsonl") or embedded data ("tiny", "embedded/tasks").
_HUB_ID = re.compile(r"^(?!tiny$|embedded/)(?!.*\.(jsonl?|csv|parquet|txt)$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def model_card(info: Mapping[str, Any]) -> str:
    """Return a model card in Markdown.

    Keys of `info`, all optional but "name": "base_model" and "datasets" (hub ids reach the front matter,
    other names only the text), "license", "language", "library_name" ("transformers", "peft" or "mlx"),
    "tags", "description", "usage" (Markdown), "data" and "method" (text, or {label: value}), "figures"
    ({name: value}, or rows of equal keys, which become a table), "command", "limitations" (text or a list),
    "versions" ({package: version}).

    Raises:
        KeyError: "name" is missing.
    """
    sections = [
        f"---\n{_front_matter(info)}\n---",
        f"# {_plain(info['name'])}",
        _summary(info),
        _section("Data", info.get("data") or _list(info.get("datasets")) or "Not recorded."),
        _section("Method", info.get("method") or "Not recorded."),
        _section("Figures", info.get("figures") or "Not measured."),
    ]
    if info.get("usage"):
        sections.insert(3, f"## Use\n\n{info['usage']}")
    if info.get("command"):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", info["command"])), default=0))
        sections.append(f"## Command\n\n{fence}sh\n{info['command']}\n{fence}")
    sections.append(
        _section(
            "Limitations",
            info.get("limitations")
            or "A small language model: it states false things with confidence, repeats what its training "
            "data contains, and has not been tested for safety.",
        )
    )
    if info.get("versions"):
        sections.append(_section("Versions", info["versions"]))
    return "\n\n".join(sections) + "\n"


def _front_matter(info: Mapping[str, Any]) -> str:
    """Return the YAML block, without names that are not hub ids.

    The hub refuses a card with local paths.
    """
    from huggingface_hub import ModelCardData

    base = info.get("base_model")
    datasets = [d for d in _list(info.get("datasets")) if _HUB_ID.match(d)]
    data = ModelCardData(
        base_model=base if base and _HUB_ID.match(base) else None,
        datasets=datasets or None,
        language=info.get("language"),
        library_name=info.get("library_name", "transformers"),
        license=info.get("license"),
        pipeline_tag="text-generation",
        tags=sorted({"mlx-posttrain", *_list(info.get("tags"))}),
    )
    return data.to_yaml().strip()


def _summary(info: Mapping[str, Any]) -> str:
    lines = [_plain(info["description"])] if info.get("description") else []
    if info.get("base_model"):
        base = f"`{_plain(info['base_model'])}`"
        adapter = info.get("library_name") == "peft"
        lines.append(
            f"{f'An adapter for {base}, trained' if adapter else f'Trained from {base}'} with mlx-posttrain."
        )
    return "\n\n".join(["## What", *(lines or ["A model made with mlx-posttrain."])])


def _section(title: str, body: Any) -> str:
    return f"## {title}\n\n{_body(body)}"


def _body(body: Any) -> str:
    if isinstance(body, Mapping):
        return "\n".join(f"- {_plain(key)}: {_value(value)}" for key, value in body.items())
    if isinstance(body, str):
        return _plain(body)
    rows = list(body)
    return (
        _table(rows)
        if rows and all(isinstance(row, Mapping) for row in rows)
        else "\n".join(f"- {_value(row)}" for row in rows)
    )


def _table(rows: list[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        [_plain(column) for column in columns],
        ["---"] * len(columns),
        *[[_value(row.get(column, "")) for column in columns] for row in rows],
    ]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _value(value: Any) -> str:
    """Return a figure as text: floats with four significant digits, integers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _plain(value: Any) -> str:
    """Return a text without HTML tags: Markdown passes those through, and the hub shows cards."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", str(value))


def _list(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
