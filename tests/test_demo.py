"""The demo as a newcomer runs it: a process, the shipped model, nothing from the network; and it must have learned something."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_demo_learns_forgets_less_with_kl_reports_and_exports(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "demo", "--output", str(out)], capture_output=True, text=True, timeout=1600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads((out / "report" / "final" / "comparison.json").read_text())
    found = {m["name"]: {name: f["mean"] for name, f in m["figures"].items()} for m in comparison["models"]}
    assert list(found) == ["base", "sft", "templates", "lora", "kl", "crowd", "ppo"]
    base = found["base"]
    assert base["accuracy"] < 0.05  # the base does not know the format
    for name, more in (("sft", 0.25), ("kl", 0.25), ("lora", 0.05)):  # an adapter on so small a base learns slower than its weights
        assert found[name]["accuracy"] > base["accuracy"] + more, name
        assert found[name]["accuracy_phrasing"] > base["accuracy_phrasing"] + more, name
        assert found[name]["response_loss"] < base["response_loss"] - 2.0, name
    # The leash holds: less of the base text is forgotten than by plain SFT, and the model stays nearer to the base.
    assert abs(found["kl"]["perplexity"] - base["perplexity"]) < abs(found["sft"]["perplexity"] - base["perplexity"])
    assert found["kl"]["kl"] < found["sft"]["kl"]
    # The reward model knows more than words or length give away, and PPO raises its score on prompts it was not trained on.
    report = json.loads((out / "reward" / "report.json").read_text())
    assert report["accuracy"][0] > max(report["bag_of_words"][0], report["longer"][0]) + 0.05
    records = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    scores = [r["eval/score"] for r in records if "eval/score" in r]
    assert scores[-1] > scores[0] + 0.15
    # Thinking is learned: its form, and what it is good for.
    thinking = json.loads((out / "distill" / "report.json").read_text())
    assert thinking["format_rate"][0] > 0.5 and thinking["accuracy"][0] > thinking["base_accuracy"][0] + 0.05
    for words in ("right answers", "base-text", "repetition", "wanted", "PEFT", "mlx-posttrain run 03_lora", "before", "KL from the start",
                  "after thinking", "report.html"):  # fmt: skip
        assert words in done.stdout, words
    assert (out / "lora-peft" / "adapter_model.safetensors").is_file()
    page = (out / "report" / "final" / "report.html").read_text()
    assert "Was base text forgotten?" in page and "Reward against KL" in page
    again = subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "demo", "--output", str(out)], capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 2 and "earlier demo" in again.stderr
