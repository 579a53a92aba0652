"""The same recipe and seed on both engines: the same rows in the same order, and losses that agree step by step."""

from __future__ import annotations

import pytest

from mlx_posttrain import engines, methods, recipe
from mlx_posttrain.runs import Run

ENGINES = engines.available()


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("name", ["demo_sft", "demo_lora", "demo_kl"])
def test_twenty_steps_agree(name, tmp_path, record_property):
    curves = []
    for engine in ENGINES:
        chosen = recipe.load(name, [
            f"output={tmp_path / engine}", f"engine={engine}", "data.limit=700", "data.eval_limit=16", "train.steps=20", "train.batch_size=8",
            "train.accumulate=2", "train.eval_every=20", "sample.count=0",
        ])  # fmt: skip
        methods.get(chosen.method).run(chosen)
        curves.append([r for r in Run(tmp_path / engine).metrics() if "loss" in r])
    assert len(curves[0]) == len(curves[1]) == 20
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(*curves))
    record_property("largest loss difference", worst)
    print(f"{name}: largest loss difference over 20 steps {worst:.2e}")
    assert worst < 2e-3
    for a, b in zip(*curves):
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
    assert curves[0][-1]["loss"] < curves[0][0]["loss"] - 0.5
