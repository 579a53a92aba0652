"""One engine doing one kind of work in its own process, one unit whenever the benchmark sends "go".

    python -m mlx_posttrain.bench.worker '{"engine": "mlx-cpu", "what": "sft", ...}'

In its own process an engine has its own threads and memory, and it waits on a pipe while others work. It
writes one JSON line when it is ready, one per unit with what that took, and a last one with the memory it
used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.bench import baselines, scaling
from mlx_posttrain.bench.harness import ROLLOUT, Gate, learning_rate, open_engine, prompts
from mlx_posttrain.bench.inputs import Shape, rows
from mlx_posttrain.data.types import Example


def untrained_losses(model: Any, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, number of trained tokens) of each row.

    A baseline's loss before its first update is compared with these.
    """
    from mlx_posttrain.data import batches

    found = []
    for begin in range(0, len(examples), batch_size):
        batch = batches.collate(examples[begin : begin + batch_size], model.context)
        rows = batches.by_row(batch, model.token_logprobs([batch])[0])
        found += [(-float(np.sum(row, dtype=np.float64)), len(row)) for row in rows]
    return found


def train(spec: dict[str, Any], gate: Gate) -> None:
    """One pass over the rows per unit, for the kinds of work that train on them.

    These are sft and kl (all weights), lora and kl-lora (rank 16), and reward (neighbouring rows as pairs).
    """
    from mlx_posttrain.config import TrainSection
    from mlx_posttrain.data import pairs
    from mlx_posttrain.data.dataset import Data
    from mlx_posttrain.data.types import Preference
    from mlx_posttrain.engines.base import AdamW, AdapterSpec, head_start, width
    from mlx_posttrain.methods import reward, sft

    what, shape = spec["what"], Shape(**spec["shape"])
    rate = learning_rate(what)
    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]))
    examples = rows(shape, model.config["vocab_size"])
    if what.endswith("lora"):
        model.add_adapter(AdapterSpec(rank=16, alpha=32.0), seed=0)
    settings = TrainSection(
        batch_size=shape.batch_size if what != "reward" else max(1, shape.batch_size // 2)
    )
    loss: Any = sft.loss
    data: Any
    if what == "reward":
        model.add_head(head_start(width(model.config), 0))
        loss = reward.pair_loss()
        row = Preference(prompt=(), chosen="", rejected="")
        sides = [e.tokens for e in examples]
        known = [
            pairs.Pair(c, r, i, row) for i, (c, r) in enumerate(zip(sides[::2], sides[1::2], strict=True))
        ]
        data = pairs.PairData(known, [], settings, 0, model.context, pad=0)
    else:
        data = Data(examples, [], settings, 0, model.context)
    if what.startswith("kl"):
        model.keep_reference()
        loss = sft.kl_loss(0.1, "forward")
    first = {"rows": untrained_losses(model, examples, shape.batch_size)} if spec.get("baselines") else {}
    trainer = engine.trainer(model, AdamW())
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    steps = [data.micro_batches(data.rows(step)) for step in range(data.steps_per_epoch)]
    while gate.open():
        total = tokens = 0.0
        for step in steps:
            units = sum(b.count for b in step)
            total += trainer.step(loss, step, rate)["loss"] * units
            tokens += units
        engine.synchronize()
        gate.report(loss=total / tokens, rows=len(examples), tokens=tokens, steps=len(steps))
    gate.close(
        device=engine.device(),
        shapes=len({b.tokens.shape + b.index.shape for step in steps for b in step}),
        first=first,
    )


def generate(spec: dict[str, Any], gate: Gate) -> None:
    """Sample 8 answers of 64 tokens to each of 4 prompts.

    ``generate`` decodes them in one batch, ``generate-single`` row by row.
    """
    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]))
    prompt_rows, samples = prompts(model.config["vocab_size"]), ROLLOUT["samples"]
    settings: dict[str, Any] = {
        "max_tokens": ROLLOUT["max_tokens"],
        "stop": None,
        "temperature": 1.0,
        "seed": 0,
    }
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    while gate.open():
        if spec["what"] == "generate":
            answers = model.generate(prompt_rows, samples=samples, **settings)
        else:
            answers = [
                model.generate([p], first_row=i * samples + s, **settings)[0]
                for i, p in enumerate(prompt_rows)
                for s in range(samples)
            ]
        logprobs = [p for a in answers for p in a.logprobs]
        gate.report(loss=-float(np.mean(logprobs)), rows=len(answers), tokens=len(logprobs))
    gate.close(device=engine.device())


def ppo(spec: dict[str, Any], gate: Gate) -> None:
    """One PPO iteration per unit.

    It samples 32 answers of 64 tokens, scores them with a reward model, and updates a policy and a separate
    critic for 2 epochs.
    """
    from mlx_posttrain.engines.base import AdamW
    from mlx_posttrain.methods import ppo as method
    from mlx_posttrain.models.tokenizer import load_tokenizer
    from mlx_posttrain.rewards import scorer as scoring
    from mlx_posttrain.rl import rollouts
    from mlx_posttrain.rl.experience import Parties, experience, measure
    from mlx_posttrain.rl.rollouts import Question

    engine, folder = open_engine(spec["engine"]), Path(spec["folder"])
    batch_size = spec["shape"]["batch_size"]
    recipe = method.Recipe.model_validate(
        {
            "method": "ppo",
            "model": str(folder),
            "engine": engine.name,
            "data": {"source": "embedded/tasks", "template": "none"},
            "reward": [{"model": spec["reward"]}],
            "train": {"batch_size": batch_size, "accumulate": max(1, 32 // batch_size)},
            "rollout": {**ROLLOUT, "missing_eos_penalty": None},
        }
    )
    tokenizer = load_tokenizer(folder)
    policy = engine.load(folder)
    policy.keep_reference()
    parties = Parties(
        policy,
        engine.load(Path(spec["reward"])),
        tokenizer,
        scoring.Scorer(recipe.reward, engine, tokenizer, "none"),
        scoring.Scorer([], engine, tokenizer, "none"),
    )
    assert parties.critic is not None
    settings = AdamW(eps=1e-5, clip=0.5)
    trainers = engine.trainer(policy, settings), engine.trainer(parties.critic, settings)
    losses = method.policy_loss(recipe), method.value_loss(0.2)
    questions = [Question(tuple(p), "", {}) for p in prompts(policy.config["vocab_size"])]
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    step, first = 0, {}
    while gate.open():
        answers = rollouts.sample(
            policy,
            tokenizer,
            questions,
            samples=ROLLOUT["samples"],
            max_tokens=ROLLOUT["max_tokens"],
            temperature=1.0,
            stop=policy.config["vocab_size"] - 1,
            seed=step,
            token_budget=recipe.rollout.token_budget,
        )
        figures = measure(parties, answers, 1.0, recipe.train, policy.context)
        seen = experience(answers, parties.scorer(answers), figures, recipe.ppo, None, recipe.kl.beta)
        method.update(
            recipe, *trainers, seen, losses, learning_rate("ppo"), step, policy.context, packs=policy.packs
        )
        engine.synchronize()
        tokens = sum(len(a.tokens) for a in answers)
        entropy = seen.statistics["objective/entropy"] * len(answers) / tokens
        if step == 0:
            keys = (("kl", "kl"), ("score", "scores"), ("score_std", "scores_std"))
            first = {"entropy": entropy, **{name: seen.statistics[f"objective/{key}"] for name, key in keys}}
        step += 1
        gate.report(loss=entropy, rows=len(answers), tokens=tokens)
    gate.close(device=engine.device(), first=first)


WORK = {
    "sft": train,
    "lora": train,
    "kl": train,
    "kl-lora": train,
    "reward": train,
    "ppo": ppo,
    "generate": generate,
    "generate-single": generate,
    "scaling": scaling.train,
}


def main() -> None:
    """Do the work that the first argument describes as JSON; a failure is written as one line too."""
    spec, gate = json.loads(sys.argv[1]), Gate()
    try:
        work = baselines.TRAINERS.get(baselines.baseline_name(spec["engine"])) or WORK[spec["what"]]
        work(spec, gate)
    except Exception as error:
        gate.fail(error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
