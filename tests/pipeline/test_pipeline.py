"""Pipelines: stages feed each other, mistakes are found before the first one starts, and a kill at any moment
costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from mlx_posttrain import engines, methods, pipeline
from mlx_posttrain.console import Interrupted
from mlx_posttrain.data import read
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.source import last_language_model, locate
from mlx_posttrain.runs import Run
from mlx_posttrain.training import setup
from tests.helpers import cli, command, records, refused, run_recipe, wait_for

ENGINE = engines.available()[0]


def write(path: Path, stages: dict, **keys) -> Path:
    path.write_text(
        yaml.safe_dump({"method": "pipeline", "engine": ENGINE, **keys, "stages": stages}, sort_keys=False)
    )
    return path


@pytest.fixture
def three(random_gpt2, rows_file, tmp_path, monkeypatch) -> Path:
    """A pipeline of three stages: all weights, an adapter with dropout on them, all weights of the two
    merged.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copy(rows_file, tmp_path / "rows.jsonl")
    common = {
        "data": {"source": "rows.jsonl"},
        "data.holdout": 6,
        "train.steps": 4,
        "train.save_every": 2,
        "train.eval_every": 2,
        "train.batch_size": 3,
        "train.lr": 1e-2,
        "train.select": "last",
        "sample.count": 0,
    }
    return write(
        tmp_path / "three.yaml",
        {
            "a": {"recipe": "01_sft", "set": {**common, "model": str(random_gpt2)}},
            "b": {
                "recipe": "01_sft",
                "set": {**common, "model": "{a}", "adapter": {"rank": 4}, "adapter.dropout": 0.2},
            },
            "c": {"recipe": "01_sft", "set": {**common, "model": "{b}"}},
        },
    )


def run(path: Path, output: Path, *overrides: str) -> dict:
    return run_recipe(str(path), f"output={output}", *overrides)


def states(output: Path) -> list[str]:
    return [stage["state"] for stage in json.loads((output / "pipeline.json").read_text()).values()]


# What a pipeline does


def test_the_second_stage_starts_where_the_first_ended(tmp_path, capfd):
    """On the tiny model: an adapter that has learned nothing yet has the loss that the first stage ended
    with.
    """
    common = {
        "data.source": "embedded/tasks",
        "data.limit": 60,
        "data.eval_limit": 8,
        "train.steps": 2,
        "train.select": "last",
    }
    path = write(
        tmp_path / "two.yaml",
        {
            "tune": {"recipe": "01_sft", "set": {**common, "model": "tiny", "train.lr": 1e-3}},
            "adapt": {
                "recipe": "03_lora",
                "set": {**common, "model": "{tune}", "data.template": "instruction", "data.max_length": 256},
            },
        },
    )
    output = tmp_path / "out"
    assert cli("run", str(path), f"output={output}") == 0
    shown = capfd.readouterr()
    assert shown.out.strip() == str(output)
    tuned, adapted = (json.loads((output / name / "result.json").read_text()) for name in ("tune", "adapt"))
    assert records(output / "adapt")[0]["eval/loss"] == pytest.approx(tuned["loss"], abs=1e-5)
    assert (
        records(output / "tune")[0]["eval/loss"] > tuned["loss"] + 0.01 and adapted["loss"] != tuned["loss"]
    )
    assert (output / "adapt" / "final" / "adapter_config.json").is_file()
    assert yaml.safe_load((output / "adapt" / "recipe.yaml").read_text())["model"] == str(output / "tune")

    kept = json.loads((output / "pipeline.json").read_text())
    assert list(kept) == ["tune", "adapt"] and states(output) == ["finished"] * 2
    assert (
        kept["tune"]["result"] == tuned
        and kept["adapt"]["result"] == adapted
        and kept["adapt"]["seconds"] > 0
    )
    lines = shown.err.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("stage  ")) :]
    assert table[0].split() == ["stage", "method", "seconds", "figures"]
    assert table[2].startswith("adapt") and f"loss {adapted['loss']:.4g}" in table[2]


def test_a_stage_is_an_ordinary_run(three, tmp_path):
    """The same stage by itself gives the same figures, and the pipeline returns them."""
    results = run(three, tmp_path / "out")
    assert list(results) == ["a", "b", "c"]
    alone = pipeline.stage_recipes(methods.load_recipe(str(three), [f"output={tmp_path / 'out'}"]))["b"]
    alone.output = str(tmp_path / "alone")
    assert methods.run(alone) == results["b"]
    assert records(tmp_path / "alone") == records(tmp_path / "out" / "b")


# What a pipeline's recipe may say


def test_overrides_for_one_stage_and_for_all(three):
    chosen = methods.load_recipe(
        str(three),
        [
            "seed=7",
            "engine=torch",
            "output=there",
            "b.train.steps=9",
            "b.adapter.rank=2",
            "c.adapter=null",
            "c.seed=1",
        ],
    )
    a, b, c = pipeline.stage_recipes(chosen).values()
    assert (a.train.steps, b.train.steps, c.train.steps) == (4, 9, 4)
    assert (b.adapter.rank, b.adapter.dropout, c.adapter) == (2, 0.2, None)
    assert (a.seed, b.seed, c.seed) == (7, 7, 1)
    assert {own.engine for own in (a, b, c)} == {"torch"}
    assert [own.output for own in (a, b, c)] == [str(Path.cwd() / "there" / name) for name in "abc"]
    assert (b.model, c.model) == (str(Path.cwd() / "there" / "a"), str(Path.cwd() / "there" / "b"))
    assert a.train.epochs == 3  # of 01_sft, which nothing overrides


def test_a_colon_in_a_stages_setting_that_takes_text_makes_no_mapping(three, tmp_path):
    settings = [
        f"output={tmp_path}",
        *("b.data.prompt=Q: {question}", "b.data.columns={answer: reply}", "b.train={steps: 2}"),
    ]
    chosen = methods.load_recipe(str(three), settings)
    again = type(chosen).model_validate(chosen.model_dump(mode="json"))  # as a resumed pipeline reads it
    for recipe in (chosen, again):
        b = pipeline.stage_recipes(recipe)["b"]
        assert b.data.prompt == "Q: {question}" and b.data.columns == {"answer": "reply"}
        assert b.train.steps == 2
    for typed in ("b.model={frst}", "c.data.system=As {frst}: brief"):  # before anything is trained
        with pytest.raises(UserError, match=r"stage \w uses \{frst\}, which is no stage"):
            methods.load_recipe(str(three), [typed])


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("{a}", "OUT/a"),
        ("{a}/final", "OUT/a/final"),
        ("--from={a} --to={a}", "--from=OUT/a --to=OUT/a"),
        ({"a": None}, "OUT/a"),  # {a} without quotes
    ],
)
def test_a_name_in_braces_is_that_stages_folder(value, wanted, tmp_path):
    path = write(
        tmp_path / "p.yaml",
        {
            "a": {"recipe": "01_sft"},
            "b": {
                "recipe": "01_sft",
                "set": {
                    "model": value,
                    "sample": {"prompts": [value, "none"]},
                    "data.columns": {"prompt": value},
                },
            },
        },
    )
    b = pipeline.stage_recipes(methods.load_recipe(str(path), ["output=/o"]))["b"]
    found = wanted.replace("OUT", str(Path("/o").absolute()))
    assert b.model == found and b.sample.prompts == [found, "none"] and b.data.columns == {"prompt": found}


def test_a_run_called_prompt_is_a_stages_folder_too(tmp_path):
    report = {"recipe": {"method": "report", "runs": {"prompt": "{a}"}}}
    path = write(tmp_path / "p.yaml", {"a": {"recipe": "demo_sft"}, "r": report})
    own = pipeline.stage_recipes(methods.load_recipe(str(path), [f"output={tmp_path}"]))["r"]
    assert own.runs == {"prompt": str(tmp_path / "a")}


def test_a_stages_file_is_looked_for_beside_the_pipelines(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    # the shipped one's name, but nearer
    (tmp_path / "01_sft").write_text("method: sft\ndescription: near\ndata: {source: x.jsonl}\n")
    (tmp_path / "here.yaml").write_text(
        "method: sft\ndescription: in the working directory\ndata: {source: x.jsonl}\n"
    )
    path = write(
        tmp_path / "recipes" / "p.yaml",
        {"a": {"recipe": "../01_sft"}, "b": {"recipe": "01_sft"}, "c": {"recipe": "here.yaml"}},
    )
    shutil.copy(tmp_path / "01_sft", tmp_path / "recipes" / "01_sft")
    monkeypatch.chdir(tmp_path)
    found = [
        own.description for own in pipeline.stage_recipes(methods.load_recipe("recipes/p.yaml")).values()
    ]
    assert found == ["near", "near", "in the working directory"]
    (tmp_path / "recipes" / "01_sft").unlink()
    monkeypatch.chdir(tmp_path / "recipes")
    shutil.copy(tmp_path / "here.yaml", "here.yaml")
    # the shipped one
    assert "memorise" in pipeline.stage_recipes(methods.load_recipe(path.name))["b"].description


def test_a_stages_recipe_may_stand_in_the_pipeline(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        {"a": {"recipe": {"method": "sft", "data": {"source": "x.jsonl"}}, "set": {"data.limit": 3}}},
    )
    own = pipeline.stage_recipes(methods.load_recipe(str(path)))["a"]
    assert own.data.source == "x.jsonl" and own.data.limit == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["c.train.stps=3"], ["three.yaml", "stage c", "01_sft", "'train.stps'", "'train.steps'"]),
        (["c.train.lr=fast"], ["stage c", "'train.lr'", "'fast'"]),
        (["c.adapter.quantize=5"], ["stage c", "quantize"]),
        (["bb.train.steps=3"], ["'bb'", "did you mean 'b'"]),
        (["sedd=3"], ["'sedd'", "'seed'"]),
        (["xyzzy=3"], ["'xyzzy'", "stages: a, b, c"]),
        (["b=3"], ["'b' is a stage", "b.key=value"]),
        (["a.model={b}"], ["stage a uses {b}", "comes later", "before it: nothing"]),
        (["b.model={b}"], ["stage b uses {b}", "itself"]),
        (["c.model='{d}'"], ["stage c uses {d}", "is no stage", "a, b"]),
        (["c.sample.prompts=['x {e}']"], ["stage c uses {e}"]),
        (["b.output=there"], ["stage b", "output/b"]),
        (["b.data.source.x=1"], ["stage b", "data.source"]),
        (["stages.c.recipe=01_sftt"], ["stage c", "'01_sftt'", "01_sft?"]),
        (["stages.c.recpe=01_sft"], ["'stages.c.recpe'", "stages.c.set"]),
        (["stages.c.recipe=three.yaml"], ["stage c", "a pipeline cannot"]),
        (["stages.c.recipe={method: sftt}"], ["stage c", "'sftt'", "'sft'"]),
        (["stages.c.set=3"], ["stages.c.set", "mapping"]),
        (["stages.seed.recipe=01_sft"], ["stage 'seed'", "key of a pipeline"]),
        (["stages.d-e.recipe=01_sft"], ["stage 'd-e'", "letters"]),
        (["stages={}"], ["stages"]),
        (["stages.c.set={adapter: 3, adapter.rank: 4}"], ["'adapter.rank'", "not a section"]),
        (["seed=-1"], ["'seed'"]),
    ],
)
def test_mistakes_are_found_before_anything_runs(overrides, words, three, tmp_path, capfd):
    last = refused(capfd, "run", str(three), f"output={tmp_path / 'out'}", *overrides)
    for word in words:
        assert word in last, last
    assert not (tmp_path / "out").exists()


def test_every_key_is_described(capfd):
    assert cli("keys", "pipeline") == 0
    lines = capfd.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines if not line.startswith(" ")} >= {
        "method",
        "engine",
        "seed",
        "output",
        "stages",
        "stages.recipe",
        "stages.set",
    }


# Going on


@pytest.fixture
def start():
    """Start ``mlx-posttrain run`` as a process; none outlives the test."""
    begun: list[subprocess.Popen] = []

    def call(*arguments: str, **options) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command("run", *arguments), **pipes, **options))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("b/checkpoints/step-000002", id="inside the second stage"),
        pytest.param("a/final", id="between stages", marks=pytest.mark.exhaustive),
    ],
)
def test_kill_and_resume_equals_an_uninterrupted_pipeline(moment, three, start, tmp_path):
    """Resumed from another folder, without the pipeline's file: the run directory holds all that is
    needed.
    """
    wanted = run(three, tmp_path / "whole", "b.train.steps=12")
    broken = tmp_path / "broken"
    process = start(str(three), "output=broken", "b.train.steps=12", cwd=tmp_path)
    wait_for(lambda: (broken / moment).is_dir(), process)
    process.kill()  # kill -9: no handler runs
    process.communicate()
    assert not (broken / "b" / "final").exists() and not (broken / "c").exists(), (
        "the kill came too late to prove anything"
    )
    assert states(broken)[1:] in (["running", "waiting"], ["waiting", "waiting"])
    first = {p: p.stat().st_mtime_ns for p in (broken / "a" / "final").rglob("*")}

    three.unlink()
    (tmp_path / "elsewhere").mkdir()
    done = start("--resume", str(broken), cwd=tmp_path / "elsewhere")
    _, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    for name in "abc":
        assert records(broken / name) == records(tmp_path / "whole" / name), name
    kept = json.loads((broken / "pipeline.json").read_text())
    assert {name: stage["result"] for name, stage in kept.items()} == wanted and states(broken) == [
        "finished"
    ] * 3
    assert {p: p.stat().st_mtime_ns for p in (broken / "a" / "final").rglob("*")} == first, (
        "a finished stage was run again"
    )
    assert "stage 1 of 3, a: finished before" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_how_to_resume_the_pipeline(number, three, start, tmp_path):
    output = tmp_path / "out"
    process = start(
        str(three),
        f"output={output}",
        "b.train.steps=5000",
        "b.train.eval_every=100000",
        "b.train.save_every=100000",
    )
    wait_for(lambda: (output / "b" / "metrics.jsonl").is_file() and len(records(output / "b")) > 2, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    last = errors.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in errors
    assert last.startswith("mlx-posttrain: stage b: interrupted") and last.endswith(f"--resume {output}")
    assert states(output) == ["finished", "interrupted", "waiting"]


def test_ctrl_c_while_a_stage_loads(three, tmp_path, monkeypatch):
    """Outside the training loop no handler waits for the end of a step."""
    real, calls = read.load_tokenizer, []

    def once_interrupted(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(folder)

    monkeypatch.setattr(read, "load_tokenizer", once_interrupted)
    output = tmp_path / "out"
    with pytest.raises(Interrupted, match=f"stage b: .*--resume {output}$"):
        run(three, output)
    assert states(output) == ["finished", "interrupted", "waiting"]
    assert cli("run", "--resume", str(output)) == 0
    assert states(output) == ["finished"] * 3 and (output / "c" / "final").is_dir()


def test_killed_when_the_last_stage_was_done_but_not_noted(three, tmp_path, capfd):
    output = tmp_path / "out"
    run(three, output)
    kept = json.loads((output / "pipeline.json").read_text())
    half = {**kept, "c": {**kept["c"], "state": "running", "seconds": 0.0, "result": None}}
    (output / "pipeline.json").write_text(json.dumps(half))
    assert cli("run", "--resume", str(output)) == 0
    assert json.loads((output / "pipeline.json").read_text())["c"] == {**kept["c"], "seconds": 0.0}

    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    assert (
        refused(capfd, "run", "--resume", str(output))
        == f"mlx-posttrain: {output} is finished: there is nothing to resume"
    )
    assert "finished pipeline" in refused(capfd, "run", str(three), f"output={output}")
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_killed_while_a_stages_recipe_was_written(three, tmp_path):
    output = tmp_path / "out"
    run(three, output)
    shutil.rmtree(output / "c")
    (output / "c").mkdir()
    (output / "c" / ".tmp-123-recipe.yaml").write_text("method: s")
    (output / "pipeline.json").unlink()
    assert cli("run", "--resume", str(output)) == 0
    assert states(output) == ["finished"] * 3 and not (output / "c" / ".tmp-123-recipe.yaml").exists()


def test_a_first_stage_that_cannot_start_leaves_nothing(three, tmp_path, capfd):
    last = refused(capfd, "run", str(three), f"output={tmp_path / 'out'}", "a.data.source=nothing.jsonl")
    assert "stage a: " in last and "nothing.jsonl" in last and "resume" not in last
    assert not (tmp_path / "out").exists()


def test_a_later_stage_that_cannot_start_can_be_corrected(three, tmp_path, capfd):
    output = tmp_path / "out"
    last = refused(capfd, "run", str(three), f"output={output}", "b.data.source=nothing.jsonl")
    for word in (
        "stage b: ",
        "nothing.jsonl",
        "stages.b.set",
        str(output / "recipe.yaml"),
        f"--resume {output}",
    ):
        assert word in last
    assert states(output) == ["finished", "failed", "waiting"] and not (output / "b").exists()
    text = (output / "recipe.yaml").read_text()
    raw = yaml.safe_load(text)
    raw["stages"]["b"]["set"]["data"]["source"] = str(tmp_path / "rows.jsonl")
    (output / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    assert cli("run", "--resume", str(output)) == 0
    assert states(output) == ["finished"] * 3


def test_other_settings_for_a_stage_that_was_begun_are_refused(three, tmp_path, monkeypatch, capfd):
    output = tmp_path / "out"
    trained = setup.train

    def until_c(method, own, resume=False, callbacks=None):
        if own.output.endswith("/c"):
            raise UserError("no")
        return trained(method, own, resume, callbacks)

    monkeypatch.setattr(setup, "train", until_c)
    with pytest.raises(UserError, match="stage c: no"):
        run(three, output)
    monkeypatch.undo()
    whole = (output / "recipe.yaml").read_text()
    raw = yaml.safe_load(whole)
    raw["stages"]["a"]["set"]["train"]["lr"] = 0.02
    (output / "recipe.yaml").write_text(yaml.safe_dump(raw))
    said = refused(capfd, "run", "--resume", str(output))
    assert "stage a was begun with other settings (train.lr: 0.01 -> 0.02): put them back" in said
    raw = yaml.safe_load(whole)
    raw["stages"]["c"]["set"]["train"]["lr"] = 0.02  # not begun yet
    (output / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert cli("run", "--resume", str(output)) == 0
    assert yaml.safe_load((output / "c" / "recipe.yaml").read_text())["train"]["lr"] == 0.02


def test_a_stage_that_fails_says_how_to_go_on(three, tmp_path, monkeypatch, capfd):
    """The loss of the second stage turns infinite: its folder stays, and the advice names the pipeline."""
    real, calls = setup.train, []

    def failing(method, own, resume=False, callbacks=None):
        calls.append((own.output, resume))
        if len(calls) == 2:
            Run(Path(own.output)).folder.mkdir()
            (Path(own.output) / "recipe.yaml").write_text(yaml.safe_dump(own.model_dump(mode="json")))
            raise UserError("step 3: the loss is inf")
        return real(method, own, resume, callbacks)

    monkeypatch.setattr(setup, "train", failing)
    output = tmp_path / "out"
    with pytest.raises(
        UserError,
        match=r"stage b: step 3: the loss is inf; continue with --resume "
        rf"{output} \(.*delete {output / 'b'}",
    ):
        run(three, output)
    assert cli("run", "--resume", str(output)) == 0
    assert calls[2:] == [(str(output / "b"), True), (str(output / "c"), False)]


def test_a_pipelines_own_recipe_can_be_run_again(three, tmp_path):
    run(three, tmp_path / "out", "b.train.steps=3")
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept["environment"]["versions"]["numpy"] and kept["engine"] == ENGINE
    assert (
        kept["stages"]["b"]["recipe"]["train"]["steps"] == 3 and kept["stages"]["b"]["set"]["model"] == "{a}"
    )
    again = methods.load_recipe(
        str(tmp_path / "out" / "recipe.yaml"), [f"output={tmp_path / 'again'}", "c.train.steps=2"]
    )
    own = pipeline.stage_recipes(again)
    assert (
        own["b"].model == str(tmp_path / "again" / "a")
        and own["b"].train.steps == 3
        and own["c"].train.steps == 2
    )
    assert own["a"].data.source == str(tmp_path / "rows.jsonl")


SAVED = {  # what stages leave in final/
    "full": ("config.json", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    "lora": ("adapter_config.json", {"task_type": "CAUSAL_LM"}),
    "reward": ("config.json", {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}),
    "reward lora": ("adapter_config.json", {"task_type": "SEQ_CLS"}),
    "report": ("report.html", {}),
}


def test_the_last_stage_that_writes_text_is_the_pipelines_model(tmp_path):
    """Whatever methods made the stages: what they saved says what they are."""

    def found(kinds: list[str], done: int) -> Path:
        names = [f"s{i}" for i in range(len(kinds))]
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            folder = tmp_path / name / ("final" if i < done else "checkpoints")
            folder.mkdir(parents=True)
            file, content = SAVED[kind]
            (folder / file).write_text(json.dumps(content))
        return last_language_model(tmp_path, names)

    assert found(["full", "reward", "full"], 3) == tmp_path / "s2"
    assert found(["full", "full", "reward"], 3) == tmp_path / "s1"
    assert found(["full", "reward", "lora"], 3) == tmp_path / "s2"
    assert found(["full", "lora", "reward lora", "report"], 4) == tmp_path / "s1"
    with pytest.raises(UserError, match=rf"unfinished.*--resume.*finished stage: {tmp_path / 's0'}$"):
        found(["full", "reward", "full"], 2)
    with pytest.raises(UserError, match=f"reward models: {tmp_path / 's0'}$"):
        found(["reward"], 1)


def test_a_pipelines_folder_is_located(three, tmp_path):
    run(three, tmp_path / "out")
    source = locate(tmp_path / "out")
    assert source.folder == tmp_path / "out" / "c" / "final" and source.adapter is None
    assert source.recipe["model"] == str(tmp_path / "out" / "b")
    shutil.rmtree(tmp_path / "out" / "c" / "final")
    with pytest.raises(UserError, match=rf"unfinished.*stage: .*{tmp_path / 'out' / 'b'}$"):
        locate(tmp_path / "out")


@pytest.mark.parametrize("name", ["a" * 300, "\u00e9" * 51, "../a"])
def test_a_stage_whose_name_is_no_folders(name, tmp_path):
    path = write(tmp_path / "long.yaml", {name: {"recipe": "01_sft"}})
    with pytest.raises(
        UserError, match="a name has letters, digits and underscores, at most 100 bytes"
    ) as error:
        methods.load_recipe(str(path), [])
    assert len(str(error.value)) < 300
