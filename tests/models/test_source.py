"""What people type for models, adapters, folders, engines and columns: found where it is meant, refused by
one line where it is nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_posttrain import config, engines, runs
from mlx_posttrain.convert import weights
from mlx_posttrain.data import read
from mlx_posttrain.data.read import read_rows
from mlx_posttrain.data.split import split_rows
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import LoadedModel
from mlx_posttrain.models.export import export
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.source import locate, starting_folder, starting_model
from tests.helpers import cli, refused, run_recipe, write_jsonl

ENGINES = engines.available()
SHORT = [f"engine={ENGINES[0]}", "train.steps=1", "sample.count=0"]


@pytest.fixture(scope="module")
def lora(random_gpt2, rows_file, tmp_path_factory) -> Path:
    """A finished adapter run."""
    folder = tmp_path_factory.mktemp("lora") / "03_lora"
    run_recipe(
        "01_sft",
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"output={folder}",
        "adapter.rank=2",
        "train.lr=1e-2",
        *SHORT,
    )
    return folder


@pytest.fixture(scope="module")
def cached(lora, random_gpt2) -> None:
    """``me/base`` and the adapter ``me/lora``, which names it, in the hub cache."""
    cache = Path(os.environ["HF_HOME"]) / "hub"
    for name, source in (("base", random_gpt2), ("lora", lora / "final")):
        repository = cache / f"models--me--{name}"
        shutil.copytree(source, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    config = cache / "models--me--lora" / "snapshots" / "abc" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}))


# starts that fail


def test_an_interrupted_start_can_be_repeated(random_gpt2, rows_file, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    settings = [f"model={random_gpt2}", f"data.source={rows_file}", f"output={tmp_path / 'run'}", *SHORT]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(read, "load_tokenizer", interrupt)
        run_recipe("01_sft", *settings)
    assert not (tmp_path / "run").exists()
    run_recipe("01_sft", *settings)


def test_an_interrupted_pretraining_takes_its_first_model_away_too(tmp_path, monkeypatch):
    def interrupt(folder):
        assert (tmp_path / "run" / "start" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "texts.jsonl", ({"text": f"The cat sat on mat {i}."} for i in range(20)))
    monkeypatch.setattr(read, "load_tokenizer", interrupt)
    small = [
        "pretrain.vocab_size=300",
        "pretrain.layers=1",
        "pretrain.width=48",
        "pretrain.heads=2",
        "pretrain.context=64",
    ]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            "00_pretrain_tiny",
            f"data.source={tmp_path / 'texts.jsonl'}",
            f"output={tmp_path / 'run'}",
            *small,
            *SHORT,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("mlx" not in ENGINES, reason="quantising needs MLX")
def test_a_refused_quantised_model_leaves_the_folder_free(random_gpt2, rows_file, tmp_path):
    weights.convert(random_gpt2, tmp_path / "q4", quantize=4, group_size=32)
    settings = [
        f"model={tmp_path / 'q4'}",
        f"data.source={rows_file}",
        f"output={tmp_path / 'run'}",
        *SHORT,
        "engine=mlx",
    ]
    with pytest.raises(UserError, match="add an adapter"):
        run_recipe("01_sft", *settings)
    assert not (tmp_path / "run").exists()
    run_recipe("01_sft", *settings, "adapter.rank=2")


# adapters on the hub


def test_an_adapter_is_found_by_its_hub_id(cached, lora, rows_file, tmp_path):
    prompts = ["The cat sat", "Numbers such as"]
    here, there = (
        LoadedModel(name, ENGINES[0]).generate(prompts, template="none", max_tokens=5)
        for name in (lora, "me/lora")
    )
    assert here == there
    run_recipe(
        "01_sft",
        "model=me/base",
        "adapter.path=me/lora",
        f"data.source={rows_file}",
        f"output={tmp_path / 'run'}",
        *SHORT,
    )
    with pytest.raises(UserError, match=r"model=me/base$"):
        base_folder("me/lora")


def test_an_exported_adapter_keeps_the_hub_id_of_its_base(cached, tmp_path):
    export("me/lora", tmp_path / "out", "peft")
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "me/base"
    )


# rows


def test_held_out_rows_that_are_all_too_long_do_not_stop_a_run(random_gpt2, tmp_path, capfd):
    from mlx_posttrain.data.types import Conversation, Turn

    rows = [{"instruction": f"Say {i}.", "output": "yes"} for i in range(30)]
    data = config.DataSection(source="rows.jsonl", holdout=1)
    everything = [Conversation((Turn("user", str(i)), Turn("assistant", "yes"))) for i in range(30)]
    _, (aside,) = split_rows(data, 1, lambda *_, **__: list(everything))
    rows[int(aside.turns[0].content)]["instruction"] = "a very long question " * 80
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = [
        f"model={random_gpt2}",
        f"data.source={source}",
        f"output={tmp_path / 'run'}",
        "data.max_length=64",
        "seed=1",
        *SHORT,
    ]
    run_recipe("01_sft", *settings, "data.holdout=1")
    said = capfd.readouterr().err
    assert said.count("held-out rows: none of them can be used") == 1 and "training rows: 29 of 29" in said
    with pytest.raises(UserError, match="no row left to train on"):
        run_recipe("01_sft", *settings, "data.holdout=0", "data.max_length=8", f"output={tmp_path / 'other'}")


def test_a_mistyped_column_of_ours_is_refused_and_a_foreign_one_is_named(random_gpt2, tmp_path, capfd):
    rows = [{"instruction": f"Say {i}.", "input": "x", "output": "yes", "points": 1} for i in range(9)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = [f"model={random_gpt2}", f"data.source={source}", f"output={tmp_path / 'run'}", *SHORT]
    with pytest.raises(
        UserError,
        match=r"data.columns names 'inptu', which no format reads; did you mean "
        r"'input'",
    ):
        run_recipe("01_sft", *settings, "data.columns={inptu: input}")
    run_recipe("01_sft", *settings, "data.columns={weight: points}")
    assert capfd.readouterr().err.count("data.columns: no format reads weight;") == 1


def test_a_configuration_that_a_file_does_not_have_is_not_used_in_silence(tmp_path, capfd):
    """No error: a shipped recipe may name the one of its own data set, and be given another source."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for source in (str(tmp_path / "rows.jsonl"), "embedded/tasks"):
        read_rows(config.DataSection(source=source, config="main"), split="train", limit=1, seed=0)
        assert (
            f"data.config=main is not used: only data sets on the hub have configurations, and {source} is "
            "none" in capfd.readouterr().err
        )


# folders and names


def test_a_run_that_is_made_of_itself(tmp_path):
    for name, below in (("a", "b"), ("b", "a"), ("pipeline", None)):
        final = tmp_path / name / "final" if below else tmp_path / name / "c" / "final"
        final.mkdir(parents=True)
        (final / "adapter_config.json").write_text("{}")
        recipe = {"method": "sft", "model": str(tmp_path / (below or "pipeline"))}
        (final.parent / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "pipeline" / "recipe.yaml").write_text('{"method": "pipeline", "stages": {"c": {}}}')
    for name in ("a", "pipeline"):
        for find in (locate, starting_folder, starting_model):
            with pytest.raises(
                UserError, match=rf"/{name}/recipe.yaml: the run's model is made of the run it"
            ):
                find(tmp_path / name)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"adapter": {"quantize": "x", "group_size": 64}}, r"recipe.yaml, adapter: 'quantize': .* not 'x'$"),
        ({"adapter": {"group_size": []}}, r"recipe.yaml, adapter: 'group_size': .* not \[\]$"),
        ({"data": {"system": 5}}, "'data.system' is 5, not text: put it right"),
    ],
)
def test_a_runs_recipe_with_a_value_of_the_wrong_kind(section, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps({"method": "sft", "model": "tiny", **section}))
    with pytest.raises(UserError, match=said):
        locate(tmp_path)


def test_an_export_onto_a_full_disk_is_one_line(lora, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"/e cannot be written \(No space left on device\): free some space"):
        export(lora, tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(random_gpt2, rows_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(random_gpt2, tmp_path / "model")
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    common = ["model=~/model", "data.source=~/rows.jsonl", *SHORT]
    run_recipe("01_sft", *common, "output=~/a", "adapter.rank=2")
    run_recipe("01_sft", *common, "output=~/b", "adapter.path=~/a")
    assert cli("export", "~/b", "--output", "~/exported") == 0
    assert (tmp_path / "b" / "final").is_dir() and (tmp_path / "exported" / "adapter_config.json").is_file()
    assert runs.is_run("~/a") and not list(Path().iterdir())


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(lora, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(lora.parent.parent)
    typed = f"{lora.parent.name}/03_lroa"
    for arguments in (["generate", typed, "--prompt", "x"], ["export", typed]):
        line = refused(capfd, *arguments)
        assert (
            f"the folder {typed} does not exist; did you mean {lora.parent.name}/03_lora?" in line
            and "hf download" not in line
        )


@pytest.mark.parametrize(
    ("name", "words"), [("tourch", "did you mean 'torch'"), ("jax", "engines: mlx, torch, auto")]
)
def test_an_unknown_engine_is_not_one_to_install(name, words):
    with pytest.raises(UserError, match=f"unknown engine '{name}'; {words}"):
        engines.get(name)


def test_a_full_run_has_nothing_to_merge(random_gpt2, rows_file, tmp_path):
    run_recipe(
        "01_sft", f"model={random_gpt2}", f"data.source={rows_file}", f"output={tmp_path / 'run'}", *SHORT
    )
    with pytest.raises(UserError, match="no adapter to merge: leave out --merge"):
        export(tmp_path / "run", tmp_path / "out", "hf", merged=True)
