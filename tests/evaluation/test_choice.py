"""The best setting of each grid: by hand, with runs that diverged, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_posttrain import methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.choice import Choice, choose, names, without_settings

RUNS = {
    f"{method} lr={lr} beta=0.1 seed={seed}": f"runs/{method}_{lr}_{seed}"
    for method in ("dpo", "big ppo")
    for lr in (1, 2)
    for seed in (0, 1)
} | {"best of 8": "runs/best"}


def write(folder: Path, metric: str, means: dict[str, float]) -> None:
    (folder / "final").mkdir(parents=True)
    models = [{"name": name, "figures": {metric: {"mean": mean}}} for name, mean in means.items()]
    (folder / "final" / "report-comparison.json").write_text(json.dumps({"models": models}))


def test_names_without_their_settings():
    assert without_settings("dpo lr=0.1 beta=0.2 seed=0") == ("dpo seed=0", "lr=0.1 beta=0.2")
    assert names(list(RUNS)) == ["dpo seed=0", "dpo seed=1", "big ppo seed=0", "big ppo seed=1", "best of 8"]


def test_the_best_mean_over_seeds_is_chosen(tmp_path):
    """dpo: .3 and .5 (mean .4) against .1 and .8 (.45); ppo the other way round."""
    values = [0.3, 0.5, 0.1, 0.8, 0.6, 0.2, 0.1, 0.1, 0.9]
    write(tmp_path / "tried", "accuracy", dict(zip(RUNS, values, strict=True)))
    kept, finding = choose(Choice(report=str(tmp_path / "tried"), metric="accuracy"), RUNS)
    assert kept == {
        "dpo seed=0": "runs/dpo_2_0",
        "dpo seed=1": "runs/dpo_2_1",
        "big ppo seed=0": "runs/big ppo_1_0",
        "big ppo seed=1": "runs/big ppo_1_1",
        "best of 8": "runs/best",
    }
    assert "dpo: lr=2 beta=0.1 of 2 (lr=1 beta=0.1 40.0%, lr=2 beta=0.1 45.0%)" in finding.sentence
    assert "best of 8" not in finding.sentence


def test_lower_is_better_of_a_perplexity_and_a_run_that_diverged_rules_its_setting_out(tmp_path):
    values = dict(zip(RUNS, [3.0, 3.0, 2.0, 2.0, 1.0, 1.0, 5.0, 5.0, 1.0], strict=True))
    del values["big ppo lr=1 beta=0.1 seed=1"]
    write(tmp_path / "tried", "perplexity", values)
    kept, _ = choose(Choice(report=str(tmp_path / "tried"), metric="perplexity"), RUNS)
    assert (kept["dpo seed=0"], kept["big ppo seed=0"]) == ("runs/dpo_2_0", "runs/big ppo_2_0")
    for name in [name for name in values if name.startswith("big ppo")]:
        del values[name]
    write(tmp_path / "none", "perplexity", values)
    with pytest.raises(UserError, match="no setting of big ppo has base-text perplexity for all its seeds"):
        choose(Choice(report=str(tmp_path / "none"), metric="perplexity"), RUNS)


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no report of runs"):
        choose(Choice(report=str(tmp_path)), RUNS)
    raw = {"method": "report", "runs": RUNS, "choose": {"report": "x", "metric": "length"}}
    with pytest.raises(UserError, match="'length' is no metric of which more or less is better"):
        methods.parse_recipe(raw, "test")
    raw["choose"] = {"report": "x"}
    raw["gains"] = {"Is dpo better?": {"pairs": [["dpo", "big ppo"]]}}
    methods.parse_recipe(raw, "test")
    raw["gains"] = {"g": {"pairs": [["dpo lr=1", "big ppo"]]}}
    with pytest.raises(UserError, match=r"gains.g names 'dpo lr=1'"):
        methods.parse_recipe(raw, "test")
