"""Arbitrary JSON, YAML and safetensors headers wherever the project reads them: accepted, or one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_posttrain.engines.process import forget_process_peak, process_peak
from mlx_posttrain.errors import UserError

#: How many examples a test draws: the same ones each time, the second lot in `make test-all` only.
COUNTS = [200, pytest.param(2000, marks=pytest.mark.exhaustive)]
#: What one example may take: seconds of the processor, and bytes above the process before the first.
SECONDS, MEMORY = 2.0, 500_000_000

#: Text as files have it: halves of surrogate pairs, control characters, separators, and long ones.
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(
        ["", "\ud83d", "\0", "\x1b[2J", "a\u2028b", "~nobody", "a" * 5000, "../..", "1e5", "²e5"]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**70, 10**300, 1e300, -0.0, float("nan"), float("inf")]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def json_text(value: Any) -> str:
    """A value as JSON as Python reads it: with NaN, and halves of surrogate pairs as escapes."""
    return json.dumps(value)


def changed(sound: dict[str, Any], keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """``sound`` with up to three of its dotted keys, or of ``keys``, set to something else."""

    def with_changes(changes: dict[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = json.loads(json.dumps(sound))
        for key, value in changes.items():
            *parents, last = key.split(".")
            section = whole
            for parent in parents:
                inner = section.get(parent)
                section[parent] = section = inner if isinstance(inner, dict) else {}
            section[last] = value
        return whole

    return st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3).map(with_changes)


def try_examples(
    count: int, strategy: st.SearchStrategy[Any], action: Callable[[Any], object], first: Any = None
) -> None:
    """Assert that ``action`` accepts each example or raises UserError of one line, within the bounds.

    ``first``, which it accepts, comes before them: what it imports does not count.
    """
    if first is not None:
        action(first)

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(example: Any) -> None:
        begun = time.process_time()
        try:
            action(example)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000, str(error)
        assert time.process_time() - begun < SECONDS

    forget_process_peak()
    before = process_peak()
    check()
    assert process_peak() - before < MEMORY
