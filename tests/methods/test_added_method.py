"""A method is one file: two that this file makes up go through everything, with nothing else changed."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import Field
from typer.testing import CliRunner

from mlx_posttrain import config, engines, methods, runs
from mlx_posttrain.cli import app
from mlx_posttrain.data.read import row_dataset
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.ops import ops
from mlx_posttrain.rl.config import RolloutRecipe
from mlx_posttrain.rl.experience import experience
from mlx_posttrain.rl.rollouts import collate_stats
from mlx_posttrain.training.method import Algorithm, Method

ENGINES = engines.available()


# Unlikelihood, on rows


class UnlikelihoodSection(config.Section):
    """How much the rows are to be avoided."""

    strength: float = Field(1.0, gt=0, description="weight of the loss")


class UnlikelihoodRecipe(config.Recipe):
    """Training against rows."""

    method: Literal["unlikelihood"] = Field(description="unlikelihood: make rows less likely")
    unlikelihood: UnlikelihoodSection = Field(default_factory=UnlikelihoodSection)


def unlikelihood(recipe: UnlikelihoodRecipe) -> Any:
    """-log(1 - p(token)): Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", eq. 4."""

    def loss(model: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        logprobs = model.logprobs(batch)
        xp = ops(logprobs)
        values = -xp.log(1.0 - xp.exp(logprobs) + 1e-6)
        value = token_mean(values, batch.mask, batch.total, batch.weight)
        return recipe.unlikelihood.strength * value, {"nll": token_mean(-logprobs, batch.mask, batch.total)}

    return loss


UNLIKELIHOOD = Method(
    name="unlikelihood",
    summary="make rows less likely",
    Recipe=UnlikelihoodRecipe,
    dataset=row_dataset,
    loss=unlikelihood,
    bench={"unlikelihood": {}},
)


# REINFORCE, on rollouts, without critic and reference


class ReinforceRecipe(RolloutRecipe):
    """REINFORCE."""

    method: Literal["reinforce"] = Field(description="reinforce: answers in proportion to their score")


def reinforce(recipe: ReinforceRecipe) -> Algorithm:
    """-A log pi: Williams 1992, with whitened returns-to-go for A."""

    def loss(model: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        logprobs = model.logprobs(batch, recipe.rollout.temperature)
        value = token_mean(-batch.extra["advantages"] * logprobs, batch.mask, batch.total)
        return value, {"loss/policy_avg": value}

    return Algorithm(loss=loss, experience=partial(experience, lam=1.0))


REINFORCE = Method(
    name="reinforce",
    summary="REINFORCE without a critic",
    Recipe=ReinforceRecipe,
    algorithm=reinforce,
    bench={"reinforce": {}},
)

DATA = {
    "source": "embedded/tasks",
    "families": ["quotes"],
    "limit": 48,
    "eval_limit": 4,
    "template": "question",
}
TRAIN = {"steps": 4, "eval_every": 2, "save_every": 2, "batch_size": 4, "lr": 1e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "unlikelihood": {
        "method": "unlikelihood",
        "description": "less of the same",
        "unlikelihood": {"strength": 0.5},
        "data": DATA,
        "train": TRAIN,
        "sample": {"count": 1, "max_tokens": 4},
    },
    "reinforce": {
        "method": "reinforce",
        "description": "more of what is long",
        "data": DATA,
        "train": TRAIN,
        "reward": [{"function": "checker"}],
        "rollout": {"prompts": 4, "samples": 2, "max_tokens": 6},
        "sample": {"count": 1},
    },
}


# The page's own example, on pairs: DPO


def of_the_page() -> Method:
    """The method that docs/adding-a-method.md shows whole, made by its own code."""
    page = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class DPOSection" in b)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "docs/adding-a-method.md", "exec", dont_inherit=True), names)
    return names["METHOD"]


RECIPES["dpo_example"] = {
    "method": "dpo_example",
    "description": "one answer rather than another",
    "dpo": {"beta": 0.1},
    "data": {**DATA, "source": "embedded/preferences", "max_length": 64},
    "train": {**TRAIN, "select": "last"},
    "sample": {"count": 1, "max_tokens": 4},
}
OWN_KEY = {"unlikelihood": "unlikelihood.strength", "reinforce": "rollout.samples", "dpo_example": "dpo.beta"}


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "dpo_example", of_the_page())
    monkeypatch.setitem(methods.METHODS, "unlikelihood", UNLIKELIHOOD)
    monkeypatch.setitem(methods.METHODS, "reinforce", REINFORCE)


@pytest.fixture
def recipe(tmp_path, random_gpt2):
    """A recipe file of a made-up method on the random model."""

    def write(name: str, engine: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**RECIPES[name], "engine": engine, "model": str(random_gpt2)}))
        return path

    return write


def command(*arguments: Any) -> str:
    """What a command prints on standard output."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def losses(run: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "seconds/rollout", "peak_gb", "active_gb", "cache_gb")
    return [{k: v for k, v in r.items() if k not in clock} for r in runs.Run(run).metrics()]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RECIPES)
def test_run_resume_plan_card_and_pipeline(name, engine, recipe, tmp_path):
    path, whole, broken = recipe(name, engine), tmp_path / "whole", tmp_path / "broken"
    command("run", path, f"output={whole}")
    records = losses(whole)
    assert [r["step"] for r in records if "lr" in r] == [1, 2, 3, 4]
    assert (whole / "final").is_dir() and (whole / "samples.jsonl").is_file()

    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "final")
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    command("run", "--resume", broken)
    assert losses(broken) == records

    (planned,) = json.loads(command("plan", path, "--json"))
    assert planned["engine"] == engine and planned["steps"] == 4 and planned["total_gb"] > 0

    card = (whole / "card.md").read_text()
    assert name in card and RECIPES[name]["description"] in card
    assert OWN_KEY[name] in card

    stages = {"first": {"recipe": str(path)}, "second": {"recipe": str(path), "set": {"model": "{first}"}}}
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(json.dumps({"method": "pipeline", "engine": engine, "stages": stages}))
    short = [f"{stage}.train.steps=1" for stage in stages]
    command("run", pipeline, f"output={tmp_path / 'two'}", *short)
    done = json.loads((tmp_path / "two" / "pipeline.json").read_text())
    assert [stage["state"] for stage in done.values()] == ["finished", "finished"]
    assert len(json.loads(command("plan", pipeline, "--json", f"output={tmp_path / 'planned'}"))) == 2

    answer = command(
        "generate", tmp_path / "two", "--prompt", "Hello", "--max-tokens", "2", "--engine", engine
    )
    assert answer.startswith("> Hello")
    page = tmp_path / "page.html"
    command("report", whole, broken, "--logs-only", "--output", page)
    assert name in page.read_text() and "whole" in page.read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_keys_help_and_unknown_keys(name, recipe):
    listed = command("keys", name)
    assert "train.lr" in listed and OWN_KEY[name] in listed
    assert "did you mean" not in command("keys", "--help")
    with pytest.raises(UserError, match=r"did you mean 'train.lr'"):
        methods.load_recipe(str(recipe(name, "auto")), ["learning_rate=1"])
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        methods.get(name[:-1])


@pytest.mark.parametrize("name", RECIPES)
def test_engines_agree(name, recipe, tmp_path):
    if len(ENGINES) < 2:
        pytest.skip("needs mlx and torch")
    curves = []
    for engine in ENGINES:
        command("run", recipe(name, engine), f"output={tmp_path / engine}")
        curves.append([r for r in losses(tmp_path / engine) if "lr" in r])
    for ours, theirs in zip(*curves, strict=True):
        key = "loss/policy_avg" if name == "reinforce" else "loss"
        assert ours["tokens"] == theirs["tokens"] and ours[key] == pytest.approx(theirs[key], abs=2e-3)


def test_dpo_starts_at_ln_2_and_prefers_what_is_chosen(recipe, tmp_path):
    """With h = 0 at the start; then the margin of the training pairs grows. With an adapter as well."""
    for more in ([], ["adapter.rank=4"]):
        run = tmp_path / f"run{len(more)}"
        command("run", recipe("dpo_example", ENGINES[0]), f"output={run}", "train.steps=12", *more)
        records = [r for r in runs.Run(run).metrics() if "lr" in r]
        assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert records[-1]["margin"] > 0 and records[-1]["loss"] < math.log(2)
        sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
        assert sample["wanted"] and "answer" in sample


def test_they_learn_what_they_say(recipe, random_gpt2, tmp_path):
    """Unlikelihood makes its rows less likely; a policy of random weights is pushed by its own advantages."""
    command("run", recipe("unlikelihood", ENGINES[0]), f"output={tmp_path / 'run'}", "train.steps=20")
    nll = [r["eval/nll"] for r in runs.Run(tmp_path / "run").metrics() if "eval/nll" in r]
    assert nll[-1] > nll[0] + 0.01

    loss = reinforce(ReinforceRecipe.model_validate(RECIPES["reinforce"])).loss
    engine = engines.get(ENGINES[0])
    model = engine.load(random_gpt2)
    rows = [
        Example((5, 6, 7, 8), (False, False, True, True)),
        Example((5, 6, 9, 9), (False, False, True, True)),
    ]
    advantages = [np.array([1.0, 1.0]), np.array([-1.0, -1.0])]
    batch = collate_stats(rows, {"advantages": advantages}, model.context)
    before = model.token_logprobs([batch])[0][:4]
    engine.trainer(model, AdamW()).step(loss, [batch], 1e-3)
    after = model.token_logprobs([batch])[0][:4]
    assert (after[:2] > before[:2]).all() and (after[2:] < before[2:]).all()
