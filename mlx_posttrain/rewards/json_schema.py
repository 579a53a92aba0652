"""A small part of JSON Schema (draft 2020-12), in time linear in the text.

Every keyword that is not among KEYWORDS or ANNOTATIONS is refused, so that a schema never means less than it
says. That leaves out what is not linear (``pattern``, ``uniqueItems``, ``oneOf``) and references. The package
jsonschema has all of it; a reward must not depend on whether a package happens to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mlx_posttrain.data.sources import nearest
from mlx_posttrain.errors import UserError

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (
        not isinstance(v, bool) and (isinstance(v, int) or (isinstance(v, float) and v % 1 == 0))
    ),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
# keyword -> (the type that it concerns, its test of a value of that type)
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, bound: value >= bound),
    "maximum": ("number", lambda value, bound: value <= bound),
    "exclusiveMinimum": ("number", lambda value, bound: value > bound),
    "exclusiveMaximum": ("number", lambda value, bound: value < bound),
    "minLength": ("string", lambda value, bound: len(value) >= bound),
    "maxLength": ("string", lambda value, bound: len(value) <= bound),
    "minItems": ("array", lambda value, bound: len(value) >= bound),
    "maxItems": ("array", lambda value, bound: len(value) <= bound),
    "minProperties": ("object", lambda value, bound: len(value) >= bound),
    "maxProperties": ("object", lambda value, bound: len(value) <= bound),
}
# keyword -> (what its value must be, in words, and the test)
_OTHERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (
        f"one of {', '.join(TYPES)}, or a list of them",
        lambda v: (
            bool(v) and all(isinstance(t, str) and t in TYPES for t in (v if isinstance(v, list) else [v]))
        ),
    ),
    "enum": ("a list", lambda v: isinstance(v, list)),
    "const": ("a value", lambda v: True),
    "properties": ("a mapping of names to schemas", lambda v: isinstance(v, Mapping)),
    "required": ("a list of names", lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v)),
    "additionalProperties": ("a schema, true or false", lambda v: isinstance(v, Mapping | bool)),
    "items": ("a schema, true or false", lambda v: isinstance(v, Mapping | bool)),
}
KEYWORDS = (*_OTHERS, *BOUNDS)
ANNOTATIONS = ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated")


def check(schema: Any, where: str = "schema") -> None:
    """Raise UserError for a schema that is none, or that has a keyword or value beyond this module's."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise UserError(f"{where}: a JSON schema is a mapping, true or false, not {type(schema).__name__}")
    for key, value in schema.items():
        if key in ANNOTATIONS:
            continue
        if key in BOUNDS:
            words, right = "a number", TYPES["number"](value)
        elif key in _OTHERS:
            words, right = _OTHERS[key][0], _OTHERS[key][1](value)
        else:
            raise UserError(
                f"{where}: the keyword {key!r} is not understood{nearest(str(key), list(KEYWORDS))} "
                f"(there are {', '.join(KEYWORDS)})"
            )
        if not right:
            raise UserError(f"{where}: {key} must be {words}, found {value!r:.60}")
    for name, part in schema.get("properties", {}).items():
        check(part, f"{where}.properties.{name}")
    for key in ("additionalProperties", "items"):
        check(schema.get(key, True), f"{where}.{key}")


def read(schema: Any) -> Any:
    """Return the checked schema of a row, a mapping or its JSON text; true, which allows all, for None."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"schema: no valid JSON: {error}") from None
    # a table gives every row the keys of all, with None for those that a row lacks
    schema = True if schema is None else _without_none(schema)
    check(schema)
    return schema


def _without_none(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in ("const", "enum", "default") else _without_none(value)
        for key, value in schema.items()
        if value is not None
    }


def follows(text: str, schema: Any) -> bool:
    """Return whether the text, perhaps in a Markdown fence, is JSON that follows a checked schema.

    NaN and Infinity, which Python reads, are no JSON. None allows all.
    """
    inside = text.strip()
    if inside.startswith("```") and inside.endswith("```") and "\n" in inside:
        inside = inside[3:-3].partition("\n")[2]
    try:
        value = json.loads(inside, parse_constant=_no_number)
        return valid(value, True if schema is None else schema)
    except (ValueError, RecursionError):
        return False


def _no_number(name: str) -> Any:
    raise ValueError(name)


def valid(value: Any, schema: Any) -> bool:
    """Return whether a value follows a checked schema."""
    if isinstance(schema, bool):
        return schema
    kinds = schema.get("type", [])
    if kinds and not any(TYPES[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return False
    for keyword, (kind, holds) in BOUNDS.items():
        if keyword in schema and TYPES[kind](value) and not holds(value, schema[keyword]):
            return False
    if isinstance(value, list):
        return all(valid(one, schema.get("items", True)) for one in value)
    if isinstance(value, dict):
        parts, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(name in value for name in schema.get("required", [])) and all(
            valid(one, parts.get(name, others)) for name, one in value.items()
        )
    return True


def _same(value: Any, other: Any) -> bool:
    """Return whether two values are equal in JSON, where true is not 1."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    return bool(value == other)
