"""Run folders: every file that a run writes and another command reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from mlx_posttrain import api, jsonl, methods, pipeline, runs
from mlx_posttrain.evaluation import report
from mlx_posttrain.evaluation.findings import overfitting
from mlx_posttrain.models.card import run_card
from mlx_posttrain.models.source import locate, starting_model
from mlx_posttrain.training import edits
from tests.arbitrary import COUNTS, changed, texts, try_examples, values


@pytest.fixture
def folder(tmp_path) -> Path:
    recipe = methods.load_recipe("03_lora", {"model": "tiny", "output": str(tmp_path / "run")})
    run = runs.create(tmp_path / "run", recipe)
    run.recipe = edits.settled(recipe)
    run.log({"step": 1, "loss": 2.0, "lr": 0.1})
    run.log({"step": 1, "eval/loss": 2.0})
    run.sample({"step": 1, "prompt": "a", "answer": "b"})
    run.save_checkpoint(1, lambda folder: None, {"data": {}}, {"x": np.zeros(1)}, keep=2)
    (run.folder / "result.json").write_text('{"loss": 2.0}')
    run.close()
    return run.folder


@pytest.mark.parametrize("count", COUNTS)
def test_recipes(count, folder):
    text = (folder / "recipe.yaml").read_text()
    raw = runs.reopen(folder)[1]
    keys = [
        *raw,
        "environment",
        "environment.command",
        "environment.versions",
        "untemplated",
        "changes",
        "stages",
    ]
    keys += [f"{section}.{key}" for section in ("data", "adapter", "train") for key in raw[section]]

    def read(one: dict) -> None:
        (folder / "recipe.yaml").write_text(json.dumps(one))
        _, recipe = runs.reopen(folder)
        run_card(folder)
        starting_model(folder)
        methods.parse_recipe({**recipe, "output": str(folder)}, "recipe.yaml")

    try_examples(count, changed(raw, keys), read, first=raw)
    (folder / "recipe.yaml").write_text(text)


records = st.lists(
    st.one_of(
        values,
        st.dictionaries(
            st.one_of(st.sampled_from(["step", "loss", "eval/loss", "lr", "prompt", "answer"]), texts),
            values,
            max_size=4,
        ),
    ),
    max_size=4,
)


@pytest.mark.parametrize("count", COUNTS)
def test_records(count, folder):
    def read(lines: list) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            logs = runs.Run(folder).metrics()
            overfitting({"run": logs})
        finally:
            report._run("run", folder)

    try_examples(count, records, read, first=[{"step": 1, "loss": 2.0}])

    def resume(lines: list) -> None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.Run(folder).truncate_logs(1)
        jsonl.read(folder / "metrics.jsonl")
        for old in folder.glob("metrics.jsonl.damaged-*"):
            old.unlink()

    try_examples(count, records, resume)


@pytest.mark.parametrize("count", COUNTS)
def test_results_and_states(count, folder):
    state = folder / "checkpoints" / "step-000001" / "state.json"
    sound = json.loads(state.read_text())
    hashless = {key: value for key, value in sound.items() if key != "sha256"}

    def read(one: tuple) -> None:
        result, changed_state = one
        (folder / "result.json").write_text(json.dumps(result))
        state.write_text(json.dumps(changed_state))
        recipe = methods.parse_recipe(runs.reopen(folder)[1], "recipe.yaml")
        edits.check(runs.Run(folder), recipe, accept=False)
        runs.Run(folder).newest_checkpoint()
        assert isinstance(api.Run(folder).result, dict)
        run_card(folder)

    states = st.one_of(
        changed(hashless, [*hashless, "recipe.train", "recipe.method"]), changed(sound, [*sound])
    )
    results = st.one_of(values, st.dictionaries(texts, values, max_size=3))
    try_examples(count, st.tuples(results, states), read, first=({}, sound))


@pytest.mark.parametrize("count", COUNTS)
def test_pipelines(count, tmp_path):
    stage = {"recipe": {"method": "sft", "model": "tiny", "data": {"source": "embedded/tasks"}}, "set": {}}
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"method": "pipeline", "stages": {"a": stage, "b": stage}})
    )
    sound = {"a": {"state": "finished", "seconds": 1.0, "result": {"loss": 1.0}, "recipe": stage["recipe"]}}

    def read(one: object) -> None:
        (tmp_path / "pipeline.json").write_text(json.dumps(one))
        state = pipeline._state(tmp_path, {"a": None, "b": None})
        assert set(state) == {"a", "b"}
        for of in state.values():
            pipeline._check_begun(tmp_path, "a", of, stage["recipe"])

    keys = ["a", "b", "a.state", "a.seconds", "a.result", "a.recipe", "a.recipe.method", "a.recipe.data"]
    try_examples(count, st.one_of(values, changed(sound, keys)), read)


@pytest.mark.parametrize("count", COUNTS)
def test_final_folders(count, folder):
    """What a run saved: a model's config, or an adapter's."""
    (folder / "final").mkdir()

    def read(one: tuple) -> None:
        name, config = one
        for file in (folder / "final").iterdir():
            file.unlink()
        (folder / "final" / name).write_text(json.dumps(config))
        locate(folder)

    contents = st.one_of(values, st.dictionaries(st.sampled_from(["model_type", "task_type", "r"]), values))
    names = st.sampled_from(["config.json", "adapter_config.json"])
    try_examples(count, st.tuples(names, contents), read)
