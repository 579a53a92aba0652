"""The demo as a newcomer runs it: a process, the shipped model, nothing from the network; and it must have learned something."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_demo_learns_forgets_less_with_kl_and_exports(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "demo", "--output", str(out)], capture_output=True, text=True, timeout=1600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base, sft, lora, kl = json.loads((out / "comparison.json").read_text())
    assert [r["name"] for r in (base, sft, lora, kl)] == ["base", "SFT", "LoRA", "KL-SFT"]
    assert base["unseen_content"] < 0.05  # the base does not know the format
    for tuned, more in ((sft, 0.25), (kl, 0.25), (lora, 0.05)):  # an adapter on so small a base learns slower than its weights
        assert tuned["unseen_content"] > base["unseen_content"] + more
        assert tuned["unseen_phrasing"] > base["unseen_phrasing"] + more
        assert tuned["response_loss"] < base["response_loss"] - 2.0
    # The leash holds: less of the base text is forgotten than by plain SFT.
    assert abs(kl["base_text_perplexity"] - base["base_text_perplexity"]) < abs(sft["base_text_perplexity"] - base["base_text_perplexity"])
    # The reward model knows more than words or length give away, and PPO raises its score on prompts it was not trained on.
    report = json.loads((out / "reward" / "report.json").read_text())
    assert report["accuracy"][0] > max(report["bag_of_words"][0], report["longer"][0]) + 0.05
    records = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    scores = [r["eval/score"] for r in records if "eval/score" in r]
    assert scores[-1] > scores[0] + 0.15
    for words in ("unseen content", "base-text", "seq-rep-4", "wanted", "PEFT", "mlx-posttrain run 03_lora", "before", "KL from the start"):
        assert words in done.stdout
    assert (out / "lora-peft" / "adapter_model.safetensors").is_file()
    again = subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "demo", "--output", str(out)], capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 2 and "earlier demo" in again.stderr
