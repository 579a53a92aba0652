"""Recipes, settings and pipelines."""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st

from mlx_posttrain import config, methods
from mlx_posttrain.evaluation.suite import SuiteSection
from tests.arbitrary import COUNTS, changed, texts, try_examples, values

NAMES = sorted(config.shipped())
#: What YAML is made of.
yaml_texts = st.text(st.sampled_from("&*ab:[]{}-!<>|'\"\n\n  ?,#01~%@\t=.e"), max_size=60)


def read(path, text: str) -> object:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return methods.load_recipe(str(path))


@pytest.mark.parametrize("count", COUNTS)
def test_text(count, tmp_path):
    try_examples(count, st.one_of(yaml_texts, texts), lambda text: read(tmp_path / "r.yaml", text))


@pytest.mark.parametrize("count", COUNTS)
def test_values(count, tmp_path):
    """JSON is YAML, so any value can stand under any key."""

    def one(name: str) -> st.SearchStrategy:
        sound = config.read_yaml(config.shipped()[name])
        recipe = methods.get(sound["method"]).Recipe
        keys = [key for key, _, _ in config.describe(recipe)]
        return changed(sound, [*keys, "stages", "surprise", "data.surprise"])

    strategy = st.sampled_from(NAMES).flatmap(one)
    try_examples(count, strategy, lambda raw: read(tmp_path / "r.yaml", json.dumps(raw)))


@pytest.mark.parametrize("count", COUNTS)
def test_pipelines(count, tmp_path):
    stage = {"recipe": {"method": "sft", "model": "tiny", "data": {"source": "embedded/tasks"}}, "set": {}}
    sound = {"method": "pipeline", "output": "out", "stages": {"a": stage, "b": stage}}
    keys = [
        *("engine", "output", "seed", "stages", "stages.a", "stages.a.recipe", "stages.a.set", "a", "b"),
        *("stages.b.set.model", "stages.b.set.train", "stages.b.recipe.data", "stages.b.recipe.method"),
    ]

    def both(raw: dict) -> None:
        from mlx_posttrain import pipeline

        recipe = read(tmp_path / "r.yaml", json.dumps(raw))
        if isinstance(recipe, pipeline.Recipe):
            pipeline.stage_recipes(recipe)

    try_examples(count, changed(sound, keys), both)


@pytest.mark.parametrize("count", COUNTS)
def test_settings(count):
    keys = [key for key, _, _ in config.describe(methods.get("sft").Recipe)]
    setting = st.tuples(st.one_of(st.sampled_from(keys), texts), st.one_of(yaml_texts, texts)).map("=".join)
    try_examples(count, setting, lambda text: methods.load_recipe("01_sft", [text]))


@pytest.mark.parametrize("count", COUNTS)
def test_the_suite(count):
    keys = [key for key, _, _ in config.describe(SuiteSection)]
    suite = st.dictionaries(st.sampled_from(keys), values, max_size=3)
    try_examples(count, suite, lambda raw: config.parse(raw, SuiteSection, "settings"))
