"""The demo as a newcomer runs it: a process, the shipped model, nothing from the network; and it must have
learned something.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_posttrain import demo, engines, load, methods, runs
from mlx_posttrain.console import Interrupted
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.export import export
from mlx_posttrain.models.source import locate
from tests.helpers import command, records, run_recipe


@pytest.mark.exhaustive
@pytest.mark.timeout(1700)
def test_demo_learns_forgets_less_with_kl_reports_and_exports(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        command("demo", "--output", out), capture_output=True, text=True, timeout=1600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads((out / "report" / "final" / "report-comparison.json").read_text())
    found = {m["name"]: {name: f["mean"] for name, f in m["figures"].items()} for m in comparison["models"]}
    assert list(found) == ["base", "sft", "templates", "lora", "kl", "crowd", "ppo", "dpo"]
    base = found["base"]
    assert base["accuracy"] < 0.05  # the base does not know the format
    # an adapter on so small a base learns slower than its weights
    for name, more in (("sft", 0.25), ("kl", 0.25), ("lora", 0.05)):
        assert found[name]["accuracy"] > base["accuracy"] + more, name
        assert found[name]["accuracy_phrasing"] > base["accuracy_phrasing"] + more, name
        assert found[name]["response_loss"] < base["response_loss"] - 2.0, name
    # The leash holds: less of the base text is forgotten than by plain SFT, and the model stays nearer to the
    # base.
    assert abs(found["kl"]["perplexity"] - base["perplexity"]) < abs(
        found["sft"]["perplexity"] - base["perplexity"]
    )
    assert found["kl"]["kl"] < found["sft"]["kl"]
    # The reward model knows more than words or length give away, and PPO raises its score on prompts it was
    # not trained on.
    report = json.loads((out / "reward" / "report.json").read_text())
    assert report["accuracy"][0] > max(report["bag_of_words"][0], report["longer"][0]) + 0.05
    scores = [r["eval/score"] for r in records(out / "ppo") if "eval/score" in r]
    assert scores[-1] > scores[0] + 0.15
    # DPO prefers better answers to held-out prompts, and answers better itself.
    preferred = [r["eval/rewards/accuracies"] for r in records(out / "dpo") if "eval/rewards/accuracies" in r]
    assert preferred[-1] > 0.6
    # Thinking is learned: its form, and what it is good for.
    thinking = json.loads((out / "distill" / "report.json").read_text())
    assert thinking["format_rate"][0] > 0.5 and thinking["accuracy"][0] > thinking["base_accuracy"][0] + 0.05
    for words in (
        "right answers",
        "base-text",
        "repetition",
        "expected",
        "PEFT",
        "mlx-posttrain run 03_lora",
        "before",
        "KL from the start",
        "DPO from the same start",
        "after thinking",
        "report.html",
    ):
        assert words in done.stdout, words
    assert (out / "lora-peft" / "adapter_model.safetensors").is_file()
    page = (out / "report" / "final" / "report.html").read_text()
    for words in (
        "Was base text forgotten?",
        "Reward against KL",
        "right after thinking",
        "repetition, sampled",
    ):
        assert words in page, words
    assert "Loading weights" not in done.stderr and "FutureWarning" not in done.stderr
    again = subprocess.run(command("demo", "--output", out), capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "earlier demo" in again.stderr


def test_reading_an_adapter_through_peft_makes_no_noise(tmp_path, capfd):
    """Bars and a warning that nobody at the terminal could act on; any other warning still comes through."""
    pytest.importorskip("peft")
    from mlx_posttrain.engines.torch import peft_check

    run = tmp_path / "run"
    small = ["data.limit=16", "data.eval_limit=4", "train.steps=1", "sample.count=0"]
    run_recipe("demo_lora", f"output={run}", *small)
    export(run, tmp_path / "peft", "peft")
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        base = locate(run).folder
        assert peft_check.peft_difference(load(run).model, base, tmp_path / "peft") < 1e-3
        with peft_check.quiet_loading():
            warnings.warn("something else", FutureWarning, stacklevel=1)
    printed = capfd.readouterr()
    assert not printed.out and "Loading weights" not in printed.err
    assert [str(w.message) for w in seen if w.category is FutureWarning] == ["something else"]


def test_an_unfinished_demo_goes_on_and_any_other_folder_is_refused(tmp_path, monkeypatch):
    """Only what is done with the pipeline: the demo itself takes minutes."""
    calls = []
    out, name = tmp_path / "demo", engines.available()[0]

    def begun(folder: Path = out, seed: int = 0, engine: str = name) -> None:
        chosen = methods.load_recipe("demo", [f"output={folder}", f"engine={engine}", f"seed={seed}"])
        demo._run(folder, chosen, engine)

    def stop(chosen, resume, callbacks):
        calls.append((chosen.output, resume))
        if not resume:
            runs.create(chosen.output, chosen).close()
        raise Interrupted(
            "stage sft: interrupted (SIGINT) after step 3; everything is saved: continue "
            f"with --resume {chosen.output}"
        )

    monkeypatch.setitem(methods.METHODS, "pipeline", replace(methods.get("pipeline"), run=stop))
    for resumed in (False, True):
        with pytest.raises(Interrupted, match=r"continue with the same `mlx-posttrain demo`$"):
            demo.demo(out, name)
        assert calls.pop() == (str(out), resumed)
    with pytest.raises(UserError, match=f"unfinished demo: continue it with --engine {name} --seed 0"):
        begun(seed=1)
    # Its stages finished by `run --resume`: what is left is the closing part.
    for stage in methods.load_recipe("demo").stages:
        (out / stage / "final").mkdir(parents=True)
    begun()
    assert not calls
    (out / ("tiny-mlx" if name == "mlx" else "lora-peft")).mkdir()
    with pytest.raises(UserError, match="holds an earlier demo: delete it"):
        begun()
    runs.create(tmp_path / "run", methods.load_recipe("01_sft")).close()
    with pytest.raises(UserError, match="holds another run"):
        begun(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        begun(tmp_path / "mine")
    assert not calls
