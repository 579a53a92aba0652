"""The small part of JSON Schema against the package that has all of it."""

from __future__ import annotations

import random

import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import json_schema

SCALARS = (None, True, False, 0, 1, -1, 1.0, 2.5, "", "a", "abc")


def some_value(rng, depth=0):
    kind = rng.random()
    if kind < 0.2 and depth < 3:
        return [some_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.5 and depth < 3:
        return {name: some_value(rng, depth + 1) for name in "abc" if rng.random() < 0.6}
    return rng.choice(SCALARS)


def some_schema(rng, depth=0):
    if depth == 3 or rng.random() < 0.1:
        return rng.random() < 0.8
    makes = {
        "type": lambda: rng.choice([*json_schema.TYPES, ["integer", "string"], ["object", "array", "null"]]),
        "enum": lambda: [some_value(rng, 2) for _ in range(4)],
        "const": lambda: some_value(rng, 2),
        "properties": lambda: {name: some_schema(rng, depth + 1) for name in rng.sample("abcd", 2)},
        "required": lambda: rng.sample("abc", rng.randint(0, 2)),
        "additionalProperties": lambda: some_schema(rng, depth + 1),
        "items": lambda: some_schema(rng, depth + 1),
        **{keyword: lambda: rng.randint(0, 2) for keyword in json_schema.BOUNDS},
    }
    assert set(makes) == set(json_schema.KEYWORDS)
    return {keyword: makes[keyword]() for keyword in rng.sample(list(makes), rng.randint(1, 3))}


def test_verdicts_are_those_of_jsonschema():
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    rng = random.Random(0)
    verdicts = []
    for _ in range(1500):
        schema = some_schema(rng)
        json_schema.check(schema)
        for value in (some_value(rng) for _ in range(4)):
            verdicts.append(json_schema.valid(value, schema))
            assert verdicts[-1] == validator(schema).is_valid(value), (schema, value)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8


@pytest.mark.parametrize(
    "text, right",
    [
        ('{"a": 1}', True),
        ('```json\n{"a": 1}\n```', True),
        ('```\n{"a": 1}```', True),
        (' \n{"a": 1} ', True),
        ('{"a": 1} so', False),
        ("{'a': 1}", False),
        ('{"a": Infinity}', False),
        ("5", True),
        ("```json```", False),
        ("", False),
        ("1" * 5000, False),  # more digits than int reads
        ('{"a":' * 50_000, False),
    ],
)
def test_texts(text, right):
    assert json_schema.follows(text, None) is right


def test_schemas_of_rows():
    assert json_schema.read(None) is True and json_schema.read('{"type": "null"}') == {"type": "null"}
    filled = {
        "type": "object",
        "items": None,
        "properties": {"a": None, "b": {"type": "null", "enum": [None]}},
    }
    assert json_schema.read(filled) == {
        "type": "object",
        "properties": {"b": {"type": "null", "enum": [None]}},
    }
    for wrong, said in (("{", "no valid JSON"), (3, "not int"), ({"oneOf": []}, "'oneOf' is not understood")):
        with pytest.raises(UserError, match=said):
            json_schema.read(wrong)
