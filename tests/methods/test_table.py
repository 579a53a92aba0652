"""The table of methods, and what people read about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlx_posttrain import config
from mlx_posttrain.bench.kinds import OTHER, kind_names
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import METHODS, get

README = Path(__file__).parents[2] / "README.md"


def test_readme_has_every_method_with_its_summary_and_recipes():
    table = (
        README.read_text(encoding="utf-8").partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    )
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines() if "`" in line
    ]
    assert {re.sub("`", "", name): summary for name, summary, _ in rows} == {
        name: method.summary for name, method in METHODS.items()
    }
    shipped: dict[str, set[str]] = {}
    for name, path in config.shipped().items():
        shipped.setdefault(config.read_yaml(path)["method"], set()).add(name)
    for name, _, recipes in rows:
        known = shipped.get(name.strip("`"))  # a report is a stage of pipelines
        assert known is None or set(re.findall(r"`(\w+)`", recipes)) == known, name


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_whole(name):
    """A method trains on rows, or on rollouts, or runs by itself; and its recipe knows its name."""
    method = METHODS[name]
    assert method.name == name and method.summary and not method.summary.endswith(".")
    parts = (method.dataset and method.loss, method.algorithm, method.run)
    assert sum(part is not None for part in parts) == 1
    assert (method.trains_on is None) == (method.run is not None)
    assert name in str(method.Recipe.model_fields["method"].annotation)


def test_bench_measures_what_methods_say():
    of_methods = [kind for method in METHODS.values() for kind in method.bench]
    assert sorted(of_methods) == sorted(set(of_methods))
    assert kind_names() == (*of_methods, *OTHER)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'reward'"):
        get("rewards")
    with pytest.raises(UserError, match=r"methods: \w+, \w+"):
        get("xyzzy")
