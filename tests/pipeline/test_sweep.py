"""Grids and sweeps: what is run, what survives a run that diverges, and the table over seeds by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlx_posttrain import engines, methods, pipeline, runs
from mlx_posttrain.console import Interrupted
from mlx_posttrain.errors import UserError
from mlx_posttrain.pipeline import grid, summary
from mlx_posttrain.pipeline.grid import Cell
from mlx_posttrain.yaml_text import MAX_CHARACTERS
from tests.helpers import cli, refused

ENGINE = engines.available()[0]


# What is run


def test_a_comma_outside_brackets_and_quotes_separates_values():
    found, fixed = grid.axes(
        [
            "train.lr=1e-5,1e-4",
            "seed=0,1,2",
            "data.families=[a,b]",
            "data.columns={prompt: q, completion: a},{prompt: f}",
            'sample.prompts=["one, two"]',
            "train.schedule=cosine, constant",
            "model=tiny",
        ]
    )
    assert found == {
        "train.lr": [1e-5, 1e-4],
        "seed": [0, 1, 2],
        "data.columns": [{"prompt": "q", "completion": "a"}, {"prompt": "f"}],
        "train.schedule": ["cosine", "constant"],
    }
    assert fixed == ["data.families=[a,b]", 'sample.prompts=["one, two"]', "model=tiny"]
    with pytest.raises(UserError, match="empty value"):
        grid.axes(["seed=0,,1"])


def test_a_grid_is_spread_out_and_later_stages_can_name_all_of_it():
    found = grid.expand(
        {
            "a": {"recipe": "01_sft"},
            "b": {
                "recipe": "01_sft",
                "set": {"train.lr": 1},
                "grid": {"train.lr": [0.5, 2e-5], "seed": [0, 1]},
            },
            "c": {
                "recipe": {"runs": {"all": "{b}", "one": "{a}"}, "rest": [{"b": None}, "{a}"], "text": "{b}s"}
            },
        }
    )
    names = ["b_lr_0_5_seed_0", "b_lr_0_5_seed_1", "b_lr_2e_05_seed_0", "b_lr_2e_05_seed_1"]
    assert list(found) == ["a", *names, "c"]
    assert found[names[2]] == {
        "recipe": "01_sft",
        "set": {"train.lr": 2e-5, "seed": 0},
        "cell": {"grid": "b", "at": {"train.lr": 2e-5, "seed": 0}, "metric": None},
    }
    assert found["c"]["recipe"] == {
        "runs": {
            "all lr=0.5 seed=0": f"{{{names[0]}}}",
            "all lr=0.5 seed=1": f"{{{names[1]}}}",
            "all lr=2e-05 seed=0": f"{{{names[2]}}}",
            "all lr=2e-05 seed=1": f"{{{names[3]}}}",
            "one": "{a}",
        },
        "rest": [*(f"{{{name}}}" for name in names), "{a}"],
        "text": "{b}s",
    }
    # Keys that end alike keep their whole names.
    both = grid.expand({"b": {"recipe": "07_ppo", "grid": {"train.lr": [1], "critic.lr": [2]}}})
    assert list(both) == ["b_train_lr_1_critic_lr_2"]


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"grid": {}}, "give keys with lists"),
        ({"grid": {"seed": 1}}, "give a list"),
        ({"grid": {"seed": []}}, "give a list"),
        ({"grid": {"seed": list(range(40)), "train.lr": list(range(40))}}, "1,600 combinations"),
        ({"grid": {"train.lr": ["a-b", "a.b"]}}, "two runs are called"),
    ],
)
def test_grids_that_are_none(stage, words):
    with pytest.raises(ValueError, match=words):
        grid.expand({"b": {"recipe": "01_sft", **stage}})


def test_two_stages_of_one_name():
    with pytest.raises(ValueError, match="two stages are called b_seed_0"):
        grid.expand({"b_seed_0": {"recipe": "01_sft"}, "b": {"recipe": "01_sft", "grid": {"seed": [0]}}})


# The table, by hand


def cells(metric: str | None = None) -> dict[str, Cell]:
    return {
        f"{lr}/{seed}": Cell(grid="g", at={"train.lr": lr, "seed": seed}, metric=metric)
        for lr in (0.1, 10.0)
        for seed in (0, 1, 2)
    }


RESULTS = {
    "0.1/0": {"loss": 1.0, "accuracy": 0.5, "step": 3, "best": True},
    "0.1/1": {"loss": 2.0, "accuracy": 0.6, "step": 3},
    "0.1/2": {"loss": 3.0, "accuracy": 0.7, "step": 3},
    "10.0/0": {"loss": 0.5, "accuracy": 0.8, "step": 3},
    "10.0/1": {"loss": 1.0, "accuracy": 1.0, "step": 3},
}


def test_means_intervals_and_differences_paired_by_seed():
    metric, rows = summary.summarise(cells(), RESULTS)
    low, high = rows
    assert metric == "loss" and low.at == {"train.lr": 0.1} and list(low.mean) == ["loss", "accuracy"]
    assert low.mean["loss"] == 2.0 and low.mean["accuracy"] == pytest.approx(0.6)
    # Student's t with 2 degrees of freedom: 4.3027 standard errors of 1 / sqrt(3)
    assert low.interval.high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert low.difference == 0.0 and low.diverged == 0
    # of the two seeds that both have: 0.5 - 1 and 1 - 2, so a mean of -0.75 and 12.706 errors of 0.25
    assert high.diverged == 1 and high.difference == pytest.approx(-0.75)
    assert high.difference_interval.low == pytest.approx(-0.75 - 12.7062 * 0.25, rel=1e-4)
    lines = summary.table(metric, rows)
    assert lines[0] == "| train.lr | seeds | loss | against the first | accuracy |"
    assert lines[2].startswith("| 0.1 | 3 | 2 [-0.4841, 4.484] |  | 0.6 |")
    assert (
        lines[3].startswith("| 10 | 2 (1 diverged) | 0.75 [")
        and "| -0.75 [-3.927, +2.427] | 0.9 |" in lines[3]
    )


def test_another_figure_and_one_that_no_run_has(capfd):
    assert summary.summarise(cells("accuracy"), RESULTS)[0] == "accuracy"
    assert summary.summarise(cells("acuracy"), RESULTS)[0] == "loss"
    assert "no run has a figure called 'acuracy', so loss is compared" in capfd.readouterr().err


def test_a_grid_of_which_every_run_diverged(tmp_path):
    lines = summary.write(tmp_path, "g", cells(), {})
    assert "| 0.1 | 0 (3 diverged) | - |  |" in lines[2] and not (tmp_path / "g.svg").exists()


def test_the_chart_is_against_the_number_or_has_a_bar_for_each_setting(tmp_path):
    metric, rows = summary.summarise(cells(), RESULTS)
    axis = summary.chart(metric, rows).axes[0]
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "train.lr" and axis.get_ylabel() == "loss"
    assert [list(line.get_xdata()) for line in axis.lines] == [[0.1, 10.0], [0.1, 0.1, 0.1, 10.0, 10.0]]
    words = {name: Cell(grid="g", at={"loss": name, "seed": 0}) for name in ("dpo", "ipo")}
    metric, rows = summary.summarise(words, {"dpo": {"a": 1.0}, "ipo": {"a": 2.0}})
    assert len(summary.chart(metric, rows).axes[0].patches) == 2


# Whole sweeps


@pytest.fixture
def small(random_gpt2, rows_file) -> list[str]:
    return [
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"engine={ENGINE}",
        "data.holdout=6",
        "train.steps=2",
        "train.batch_size=3",
        "train.select=last",
        "sample.count=0",
    ]


def test_a_sweep_goes_on_after_a_run_that_diverges(small, tmp_path, capfd):
    out = tmp_path / "sweep"
    assert cli("sweep", "01_sft", *small, "train.lr=1e-3,1e20", "seed=0,1", f"output={out}") == 0
    said = capfd.readouterr().err
    states = {name: s["state"] for name, s in json.loads((out / "pipeline.json").read_text()).items()}
    assert states == {
        "01_sft_lr_0_001_seed_0": "finished",
        "01_sft_lr_0_001_seed_1": "finished",
        "01_sft_lr_1e_20_seed_0": "diverged",
        "01_sft_lr_1e_20_seed_1": "diverged",
    }
    table = (out / "01_sft.md").read_text()
    assert table.splitlines()[0] in said and "(2 diverged)" in table
    result = json.loads((out / "01_sft_lr_0_001_seed_1" / "result.json").read_text())
    kept = json.loads((out / "01_sft.json").read_text())
    assert kept["rows"][0]["seeds"]["1"][kept["metric"]] == result[kept["metric"]]
    lines = (out / "01_sft_lr_0_001_seed_1" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "seconds" in record]
    cost = {key: kept["rows"][0]["seeds"]["1"][key] for key in ("seconds", "peak_gb")}
    assert len(steps) == 2 and cost["seconds"] == pytest.approx(sum(s["seconds"] for s in steps))
    assert cost["peak_gb"] == max(s["peak_gb"] for s in steps)
    assert "| seconds | peak_gb |" in table.splitlines()[0]
    assert (out / "01_sft.svg").stat().st_size > 1000
    assert "nothing to resume" in refused(capfd, "run", "--resume", str(out))


def test_an_interrupted_sweep_goes_on(small, tmp_path, monkeypatch):
    whole = pipeline.sweep("01_sft", [*small, "seed=0,1,2", f"output={tmp_path / 'sweep'}"])
    real, done = methods.run, []

    def once(recipe, *rest):
        if len(done) == 1:
            raise Interrupted("stop")
        done.append(recipe.seed)
        return real(recipe, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(methods, "run", once)
        with pytest.raises(Interrupted):
            pipeline.run(whole)
    assert done == [0]
    assert cli("run", "--resume", str(tmp_path / "sweep")) == 0
    kept = json.loads((tmp_path / "sweep" / "01_sft.json").read_text())
    assert list(kept["rows"][0]["seeds"]) == ["0", "1", "2"] and kept["rows"][0]["interval"] is not None


def test_a_setting_for_a_whole_grid_takes_the_place_of_its_values(tmp_path):
    raw = {"method": "pipeline", "b": {"train.lr": 0.5, "train.steps": 3}}
    cells = {"train.lr": [0.1, 0.2], "seed": [3, 4]}
    raw["stages"] = {"b": {"recipe": "01_sft", "set": {"model": "tiny"}, "grid": cells}}
    stages = methods.parse_recipe(raw, "here").stages
    assert list(stages) == ["b_lr_0_5_seed_3", "b_lr_0_5_seed_4"]
    assert [stage.cell.at for stage in stages.values()] == [{"train.lr": 0.5, "seed": s} for s in (3, 4)]
    raw["b"] = {"train.lr": "x"}
    with pytest.raises(UserError, match=r"'train\.lr'.*not 'x'"):
        methods.parse_recipe(raw, "here")


def test_a_pipeline_of_more_runs_than_a_recipe_may_be_long_is_read_again(tmp_path):
    """09_versus has 108 runs in grids: spread out they are more text than is read of a file of the user's."""
    raw = methods.load_recipe("09_versus", [f"output={tmp_path / 'run'}"])
    runs.create(tmp_path / "run", raw).close()
    assert (tmp_path / "run" / "recipe.yaml").stat().st_size > MAX_CHARACTERS
    assert len(runs.reopen(tmp_path / "run")[1]["stages"]) == 114
    with pytest.raises(UserError, match="more than 200,000"):
        methods.load_recipe(str(tmp_path / "run" / "recipe.yaml"))


def test_one_stage_of_a_pipeline_has_a_grid(small, tmp_path):
    settings = dict(s.split("=", 1) for s in small if not s.startswith("engine"))
    settings |= {"train.steps": 2, "data.holdout": 6, "train.batch_size": 3, "sample.count": 0}
    raw = {
        "method": "pipeline",
        "engine": ENGINE,
        "output": str(tmp_path / "run"),
        "b": {"train.steps": 1},
        "stages": {
            "a": {"recipe": "01_sft", "set": settings},
            "b": {"recipe": "01_sft", "set": {**settings, "model": "{a}"}, "grid": {"seed": [3, 4]}},
        },
    }
    results = methods.run(methods.parse_recipe(raw, "here"))
    assert list(results) == ["a", "b_seed_3", "b_seed_4"]
    assert [r["step"] for r in results.values()] == [2, 1, 1]  # b's own setting reached both
    assert (tmp_path / "run" / "b.md").is_file() and not (tmp_path / "run" / "a.md").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["01_sft", "seed=0"], "nothing to sweep"),
        (["07_rlhf", "seed=0,1"], "is a pipeline"),
        (["01_sft", "engine=mlx,torch"], "engine has one value"),
        (["01_sft", "trian.lr=1,2"], "trian"),
        (["01_sft", "train.lr=1,x"], "train.lr"),
        (["01_sft", "--seed", "0,1"], "seed=0,1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(arguments, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capfd, "sweep", *arguments)
    assert not list(Path(tmp_path).iterdir())
