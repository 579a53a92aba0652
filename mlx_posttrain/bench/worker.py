"""One engine doing one kind of work in its own process, one unit whenever the benchmark sends "go".

    python -m mlx_posttrain.bench.worker '{"engine": "mlx-cpu", "what": "sft", ...}'

In its own process an engine has its own threads and memory, and it waits on a pipe while others work. It
writes one JSON line when it is ready, one per unit with what that took, and a last one with the memory it
used.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.bench import baselines, scaling
from mlx_posttrain.bench.harness import ROLLOUT, Gate, learning_rate, open_engine, prompts
from mlx_posttrain.bench.inputs import Shape, labelled, rows
from mlx_posttrain.bench.kinds import on_rollouts, training_kinds
from mlx_posttrain.data.types import Example
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory import plan
from mlx_posttrain.training.reference import cache_logprobs


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
    """One pass over the rows per unit, for methods that train on rows.

    Where a method trains on pairs, neighbouring rows are one; where on labelled answers, the first of two.
    """
    from mlx_posttrain.data.dataset import Dataset
    from mlx_posttrain.data.read import model_facts
    from mlx_posttrain.data.types import Pair, Preference
    from mlx_posttrain.engines.base import AdamW, hidden_size, initial_head
    from mlx_posttrain.training.setup import load_model

    what, shape, folder = spec["what"], Shape(**spec["shape"]), Path(spec["folder"])
    kind, engine = training_kinds()[what], open_engine(spec["engine"])
    method, facts = kind.method, model_facts(folder)
    assert method.loss is not None
    recipe = kind.recipe(folder, engine.name, shape.batch_size, None, spec.get("dtype", "float32"))
    collate = method.collator(recipe, facts)
    recipe.train.batch_size = max(1, shape.batch_size // collate.rows_per_item)
    model = load_model(engine, recipe, folder, getattr(recipe, "adapter", None))
    if kind.scores:
        model.add_head(initial_head(hidden_size(model.config), 0))
    if method.reference(recipe) == "distribution":
        model.keep_reference()
    examples = rows(shape, model.config["vocab_size"])
    items: list[Any] = examples
    if kind.labelled:
        items = labelled(examples, recipe.train.batch_size)
        examples = [item.answer for item in items]
    elif collate.rows_per_item == 2:
        row = Preference(prompt=(), chosen="", rejected="")
        sides = zip(examples[::2], examples[1::2], strict=True)
        items = [Pair(chosen, rejected, i, row) for i, (chosen, rejected) in enumerate(sides)]
    dataset = Dataset(items, [], collate, recipe.train, 0)
    first: dict[str, Any] = {}
    if spec.get("baselines"):
        first = {"rows": untrained_losses(model, examples, shape.batch_size)}
    if method.reference(recipe) == "logprobs":
        with tempfile.TemporaryDirectory() as scratch:
            cache_logprobs(dataset, Path(scratch) / "reference.safetensors", "", lambda: model)
    trainer, loss, rate = engine.trainer(model, AdamW()), method.loss(recipe), learning_rate(kind.adapter)
    steps = [dataset.micro_batches(dataset.rows(step)) for step in range(dataset.steps_per_epoch)]
    if first and method.reference(recipe) == "logprobs":
        first["start"] = model.evaluate(loss, [b for step in steps for b in step])["loss"]
    planned = _planned_gb(
        lambda: plan.of_rows(recipe, engine.name, plan.size(folder), dataset, method.reference)
    )
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    while gate.open():
        total = units = tokens = 0.0
        for step in steps:
            count = sum(b.count for b in step)
            total += trainer.step(loss, step, rate)["loss"] * count
            units += count
            tokens += sum(b.trained_tokens for b in step)
        engine.synchronize()
        gate.report(loss=total / units, rows=len(examples), tokens=tokens, steps=len(steps))
    gate.close(
        device=engine.device(),
        shapes=len({b.tokens.shape + b.index.shape for step in steps for b in step}),
        first=first,
        planned_gb=planned,
    )


def _planned_gb(make: Callable[[], plan.Plan]) -> float | None:
    """The peak that ``plan`` predicts, in GB; None for a model that it does not know."""
    with contextlib.suppress(UserError):
        return make().total_gb
    return None


def generate(spec: dict[str, Any], gate: Gate) -> None:
    """Sample 8 answers of 64 tokens to each of 4 prompts.

    ``generate`` decodes them in one batch, ``generate-single`` row by row.
    """
    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]), dtype=spec.get("dtype", "float32"))
    prompt_rows = prompts(model.config["vocab_size"], Shape(**spec.get("shape", {})).length)
    samples = ROLLOUT["samples"]
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


def roll_out(spec: dict[str, Any], gate: Gate) -> None:
    """One iteration on rollouts per unit, for methods that train on them.

    It samples 32 answers of 64 tokens, scores them, and updates the policy and where there is one the critic.
    """
    from mlx_posttrain.memory.model_size import size
    from mlx_posttrain.models.tokenizer import load_tokenizer
    from mlx_posttrain.rl.actors import make_actors
    from mlx_posttrain.rl.learner import RolloutLearner
    from mlx_posttrain.rl.rollouts import Prompt
    from mlx_posttrain.training.setup import load_model, plan_rollouts

    kind, engine, folder = training_kinds()[spec["what"]], open_engine(spec["engine"]), Path(spec["folder"])
    size_and_reward = (spec["shape"]["batch_size"], spec.get("reward"))
    recipe = kind.recipe(folder, engine.name, *size_and_reward, spec.get("dtype", "float32"))
    assert kind.method.algorithm is not None
    algorithm, reference = kind.method.algorithm(recipe), kind.method.reference(recipe)
    policy = load_model(engine, recipe, folder, recipe.adapter)
    asked = prompts(policy.config["vocab_size"], Shape(**spec.get("shape", {})).length)
    prompt_rows = [Prompt(tuple(p), "", {}) for p in asked]
    actors, data = make_actors(
        engine, recipe, algorithm, reference, folder, policy, load_tokenizer(folder), (prompt_rows, [])
    )
    stop = policy.config["vocab_size"] - 1  # rarely sampled: answers have full length
    learner = RolloutLearner(
        engine, actors, algorithm, recipe, data, reference, lambda record: None, stop=stop
    )
    planned = _planned_gb(lambda: plan_rollouts(kind.method, recipe, engine, size(folder), (prompt_rows, [])))
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    step, first = 0, {}
    while gate.open():
        stats = learner.step(step, learning_rate(kind.adapter))
        engine.synchronize()
        tokens, answers = stats["tokens"], ROLLOUT["prompts"] * ROLLOUT["samples"]
        entropy = stats["objective/entropy"] * answers / tokens
        if step == 0:
            scores = learner.last_scores.total
            divergence = stats.get("objective/kl", stats.get("kl", 0.0))  # without a penalty there is none
            first = {"entropy": entropy, "kl": divergence, "score": scores.mean(), "score_std": scores.std()}
        step += 1
        gate.report(loss=entropy, rows=answers, tokens=tokens)
    gate.close(device=engine.device(), first=first, planned_gb=planned)


def find_work(what: str) -> Callable[[dict[str, Any], Gate], None]:
    """The function that does a kind of work."""
    other = {"generate": generate, "generate-single": generate, "scaling": scaling.train}
    return other.get(what) or (roll_out if on_rollouts(what) else train)


def main() -> None:
    """Do the work that the first argument describes as JSON; a failure is written as one line too."""
    spec, gate = json.loads(sys.argv[1]), Gate()
    try:
        work = baselines.find_baseline(spec["engine"], spec["what"]) or find_work(spec["what"])
        work(spec, gate)
    except Exception as error:
        gate.fail(error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
