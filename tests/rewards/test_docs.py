"""docs/rewards.md against the code: the table of stock rewards, its recipe and its functions."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml

from mlx_posttrain.config import describe
from mlx_posttrain.rewards import functions, json_schema
from mlx_posttrain.rewards.scorer import RewardEntry


@pytest.fixture(scope="module")
def page(root):
    return (root / "docs" / "rewards.md").read_text(encoding="utf-8")


def table(page, heading):
    """The cells of the rows of the first table after a line."""
    rows = page.partition(heading)[2].partition("\n|---")[2].partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_has_every_stock_reward_with_its_arguments(page):
    rows = table(page, "| name | args |")
    assert sorted(name.strip("`") for name, *_ in rows) == sorted(functions.BUILT_IN)
    for name, args, *_ in rows:
        function = functions.load(name.strip("`"))
        parameters = inspect.signature(function).parameters.values()
        settings = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        expected = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in settings]
        assert re.findall(r"`([^`]+)`", args) == expected, name
        assert len(inspect.getdoc(function)) > 80


def test_every_key_of_an_entry_is_described(page):
    named = {name.strip("`") for name, _ in table(page, "| key | meaning |")}
    assert named == {key for key, _, _ in describe(RewardEntry)}


def test_the_shown_recipe_is_one(page):
    shown = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
    assert [RewardEntry.model_validate(entry).short_name for entry in shown["reward"]] == [
        "exact_answer",
        "format",
        "overlong",
        "brief",
        "07_reward",
    ]


def test_the_shown_functions_run(page, tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(page.split("```python")[1].split("```")[0])
    brief = functions.bind(functions.load(f"{file}:brief"), {"limit": 2}, "brief")
    assert functions.call(brief, ["p"] * 2, ["a", "a b c"], {}, "brief").tolist() == [1, 0.5]
    judged = functions.load(f"{file}:judged")
    found = functions.call(judged, ["p"] * 2, ["a", "b"], {"answer": ["a", "a"]}, "judged")
    assert found.tolist() == [1, 0]


def test_the_keywords_of_schemas_are_named(page):
    named = page.partition("**JSON Schema**")[2].partition("Other keywords")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(json_schema.KEYWORDS) - set(json_schema.BOUNDS)
