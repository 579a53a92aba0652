"""The same recipe and seed on both engines: the same rows in the same order, equal losses at every step."""

from __future__ import annotations

import json

import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.runs import Run

ENGINES = engines.available()


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize(
    "name", ["demo_lora", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("demo_sft", "demo_kl"))]
)
def test_twenty_steps_agree(name, tmp_path, record_property):
    curves = []
    for engine in ENGINES:
        chosen = methods.load_recipe(
            name,
            [
                f"output={tmp_path / engine}",
                f"engine={engine}",
                "data.limit=700",
                "data.eval_limit=16",
                "train.steps=20",
                "train.batch_size=8",
                "train.grad_accumulation=2",
                "train.eval_every=20",
                "sample.count=0",
            ],
        )
        methods.run(chosen)
        curves.append([r for r in Run(tmp_path / engine).metrics() if "loss" in r])
    assert len(curves[0]) == len(curves[1]) == 20
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(*curves))
    record_property("largest loss difference", worst)
    print(f"{name}: largest loss difference over 20 steps {worst:.2e}")
    assert worst < 2e-3
    for a, b in zip(*curves):
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
    assert curves[0][-1]["loss"] < curves[0][0]["loss"] - 0.5


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
def test_reward_models_and_ppo_agree(random_gpt2, tmp_path):
    """Reward models: pairs in the same order and equal losses. PPO: the same completions and equal metrics.

    Both engines' PPO runs use one of the two reward models.
    """
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"cat {i} moon", "rejected": f"hill {i} dog and dog"}
        for i in range(48)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    data = [
        "data.eval_split=null",
        "data.limit=null",
        "data.holdout=8",
        "data.template=question",
        "data.max_length=48",
        f"model={random_gpt2}",
    ]

    def curve(name: str, engine: str, *overrides: str) -> list[dict]:
        output = tmp_path / f"{name}-{engine}"
        chosen = methods.load_recipe(
            name,
            [
                *data,
                f"engine={engine}",
                f"output={output}",
                "train.batch_size=8",
                "train.grad_accumulation=1",
                *overrides,
            ],
        )
        methods.run(chosen)
        return [r for r in Run(output).metrics() if "lr" in r]

    ours, theirs = (
        curve("07_reward", e, f"data.source={pairs}", "train.lr=1e-3", "train.steps=10") for e in ENGINES
    )
    assert len(ours) == len(theirs) == 10
    assert [r["nll"] for r in ours] == pytest.approx([r["nll"] for r in theirs], abs=1e-3)
    assert ours[-1]["nll"] < ours[0]["nll"] - 0.1

    reward = f"reward=[{{model: {json.dumps(str(tmp_path / f'07_reward-{ENGINES[0]}'))}}}]"
    small = [
        "rollout.prompts=8",
        "rollout.max_tokens=8",
        "train.lr=3e-4",
        "train.steps=3",
        "ppo.epochs=2",
        "sample.count=0",
        "kl.beta=0.05",
    ]
    ours, theirs = (curve("07_ppo", e, f"data.source={prompts}", reward, *small) for e in ENGINES)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert (a["tokens"], a["val/num_eos_tokens"], a["beta"]) == (
            b["tokens"],
            b["val/num_eos_tokens"],
            b["beta"],
        )
        for name in (
            "objective/scores",
            "objective/kl",
            "loss/policy_avg",
            "loss/value_avg",
            "val/ratio",
            "policy/entropy_avg",
        ):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-3), (name, a["step"])
    assert abs(ours[-1]["objective/kl"]) > 1e-3  # the policy has moved
