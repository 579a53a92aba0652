"""The Python API: what docs/api.md promises, on both engines, and that page's own code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mlx_posttrain as mp
from mlx_posttrain import engines
from mlx_posttrain.losses.sft import token_mean

ENGINES = engines.available()
SMALL = {"data.source": "embedded/tasks", "data.limit": 48, "data.eval_limit": 6, "data.template": "question"}


def overrides(model: Path, output: Path, engine: str, **more: object) -> dict[str, object]:
    steps = {"train.steps": 4, "train.eval_every": 2, "train.save_every": 2, "train.batch_size": 4}
    return {"model": model, "output": output, "engine": engine, "sample.count": 0, **SMALL, **steps, **more}


@pytest.mark.parametrize("engine", ENGINES)
def test_train_calls_back_and_returns_the_run(engine, random_gpt2, tmp_path):
    seen: list[tuple[str, object]] = []

    def note(name):
        return lambda run, value: seen.append((name, value)) or (isinstance(run, mp.Run) and None)

    run = mp.train(
        "01_sft",
        overrides(random_gpt2, tmp_path / "run", engine),
        on_step=note("step"),
        on_evaluate=note("evaluate"),
        on_save=note("save"),
    )
    assert run.folder == tmp_path / "run" and [r["step"] for r in run.metrics if "lr" in r] == [1, 2, 3, 4]
    steps = [value for name, value in seen if name == "step"]
    assert steps == [r for r in run.metrics if "lr" in r]
    assert [v["step"] for name, v in seen if name == "evaluate"] == [0, 2, 4]  # type: ignore[index]
    assert [Path(v).name for name, v in seen if name == "save"] == ["step-000002", "step-000004"]  # type: ignore[arg-type]
    assert run.result["loss"] == min(r["eval/loss"] for r in run.metrics if "eval/loss" in r)
    (answer,) = run.model(engine).generate(["What is 2 + 2?"], max_tokens=3)
    assert isinstance(answer, str)


@pytest.mark.parametrize("where", ["on_step", "on_evaluate", "on_save"])
def test_a_callback_that_returns_true_ends_training_after_a_checkpoint(where, random_gpt2, tmp_path):
    stop = {where: lambda run, value: (value["step"] if isinstance(value, dict) else 2) >= 2}
    run = mp.train(
        "01_sft", overrides(random_gpt2, tmp_path / "run", ENGINES[0], **{"train.select": "last"}), **stop
    )
    assert [r["step"] for r in run.metrics if "lr" in r] == [1, 2]
    assert (run.folder / "checkpoints" / "step-000002").is_dir() and (run.folder / "final").is_dir()
    assert run.result["step"] == 2


def test_resume_continues_what_a_defect_in_a_callback_broke(random_gpt2, tmp_path):
    def fail(run, row):
        if row["step"] == 3:
            raise RuntimeError("mine")

    settings = overrides(random_gpt2, tmp_path / "run", ENGINES[0])
    with pytest.raises(RuntimeError, match="mine"):
        mp.train("01_sft", settings, on_step=fail)
    run = mp.train(tmp_path / "run", resume=True)
    whole = mp.train("01_sft", {**settings, "output": tmp_path / "whole"})
    assert [r.get("loss") for r in run.metrics] == [r.get("loss") for r in whole.metrics]
    with pytest.raises(mp.UserError, match="its own recipe"):
        mp.train(tmp_path / "run", {"train.lr": 1}, resume=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_ones_own_loss_is_what_trains(engine, random_gpt2, tmp_path):
    def against(model, batch):
        value = token_mean(model.logprobs(batch), batch.mask, batch.total)
        return value, {"nll": -value}

    settings = overrides(random_gpt2, tmp_path / "run", engine, **{"train.lr": 1e-3, "train.steps": 8})
    run = mp.train("01_sft", settings, loss=against)
    nll = [r["nll"] for r in run.metrics if "nll" in r]
    assert nll[-1] > nll[0] and run.metrics[1]["loss"] == pytest.approx(-run.metrics[1]["nll"])
    with pytest.raises(mp.UserError, match="takes no loss"):
        mp.train({"method": "report", "runs": {"a": "b"}, "output": str(tmp_path / "r")}, loss=against)


def test_ones_own_reward_is_what_scores(random_gpt2, tmp_path):
    asked: list[int] = []

    def longest(prompts, completions, **columns):
        asked.append(len(completions))
        return [float(len(c)) for c in completions]

    settings = overrides(random_gpt2, tmp_path / "run", ENGINES[0], **{"critic.kind": "shared"})
    settings |= {"rollout.prompts": 4, "rollout.max_tokens": 5, "train.steps": 1, "data.max_length": 48}
    run = mp.train("07_ppo", {**settings, "data.eval_split": "valid", "data.split": "train"}, reward=longest)
    assert asked and run.metrics[-1]["step"] == 1
    recipe = (run.folder / "recipe.yaml").read_text()
    assert "python:longest" in recipe


@pytest.mark.parametrize("engine", ENGINES)
def test_logprobs_are_those_of_the_logits(engine, random_gpt2):
    model = mp.load(random_gpt2, engine)
    prompts, completions = ["The cat", "A small dog", ""], [" sat on the mat", " ran", "The cat"]
    found = model.logprobs(prompts, completions)
    eos = model.tokenizer.eos_token_id
    for prompt, completion, value in zip(prompts, completions, found, strict=True):
        ids = [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion)]
        ids[0] = ids[0] or [eos]  # what a text without a prompt follows
        row = [*ids[0], *ids[1], eos]
        logits = model.model.full_logits(np.array([row]))[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = sum(logprobs[t - 1, row[t]] for t in range(len(ids[0]), len(row)))
        assert value == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_chat_and_what_is_refused(engine, random_gpt2, tmp_path):
    settings = overrides(random_gpt2, tmp_path / "reward", engine, **{"data.source": "embedded/preferences"})
    settings |= {"data.max_length": 64, "data.split": "train", "data.eval_split": "valid", "train.steps": 2}
    reward = mp.train("07_reward", settings).model(engine)
    scores = reward.score(["What is 2 + 2?", "Hello"], ["Four.", "Hello to you."])
    assert len(scores) == 2 and all(np.isfinite(scores))
    for wrong in (lambda: reward.generate(["x"]), lambda: reward.chat([{"role": "user", "content": "x"}])):
        with pytest.raises(mp.UserError, match="reward model"):
            wrong()
    model = mp.load(random_gpt2, engine)
    text = model.chat([{"role": "user", "content": "Hello"}], max_tokens=3)
    assert text == model.chat([{"role": "user", "content": "Hello"}], max_tokens=3)
    assert (
        model.chat(
            [
                {"role": "user", "content": "a b " * 60},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "Hello"},
            ],
            max_tokens=3,
        )
        == text
    )
    with pytest.raises(mp.UserError, match="no scores"):
        model.score(["x"], ["y"])
    with pytest.raises(mp.UserError, match="must be the user's"):
        model.chat([])
    with pytest.raises(mp.UserError, match="no text"):
        model.logprobs(["a"], [""])


def test_evaluate_and_compare():
    small = {"limit": 3, "max_tokens": 3, "text_limit": 2, "samples": 1, "engine": ENGINES[0]}
    one = mp.evaluate("tiny", **small)
    both = mp.compare(["tiny", "tiny"], labels=["a", "b"], **small)
    assert one.models[0].interval("accuracy").mean == both.models[0].interval("accuracy").mean
    assert "a" in both.table() and json.loads(json.dumps(both.to_dict()))
    with pytest.raises(mp.UserError, match="did you mean 'limit'"):
        mp.evaluate("tiny", limits=3)


def test_errors_are_one_line():
    for call in (
        lambda: mp.train("01_stf"),
        lambda: mp.load("nosuch/folder/at/all"),
        lambda: mp.train({"data": {}}),
    ):
        with pytest.raises(mp.UserError) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    """Every Python block of docs/api.md, in order and in one process."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/api.md, block {number + 1}", "exec"), names)
