"""One engine doing one kind of work in a process of its own, a unit whenever the benchmark says go.

    python -m mlx_posttrain.bench.worker '{"engine": "mlx-cpu", "what": "sft", ...}'

In its own process an engine has its own threads and its own memory, and while others work it waits on a pipe.
One JSON line says that it is ready, one what each unit took, and one, at the end, what it used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.bench.material import Shape, rows
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.process import process_peak
from mlx_posttrain.errors import UserError

ROLLOUT = {"prompts": 4, "samples": 8, "max_tokens": 64}


def learning_rate(what: str) -> float:
    """Small enough that losses stay comparable, large enough that a few steps move them: an adapter, which
    begins at zero, needs more.
    """
    return 3e-4 if what.endswith("lora") else 1e-5


class Gate:
    """The worker's end of the pipe: ``open`` waits for the next unit and starts the clock, ``report`` stops
    it.
    """

    def __init__(self, peak: Callable[[], float] | None = None):
        self.peak = peak
        self._out = sys.stdout
        sys.stdout = sys.stderr  # whatever a library prints must not get between the lines
        self._said_ready = False

    def open(self) -> bool:
        """Wait; False when there is nothing more to do."""
        if not self._said_ready:
            self._say(ready=True)
            self._said_ready = True
        going = sys.stdin.readline().strip() == "go"
        self._begun = time.perf_counter()
        return going

    def report(self, **figures: Any) -> None:
        """The unit's figures; everything it computed must be done."""
        self._say(seconds=time.perf_counter() - self._begun, **figures)

    def close(self, **figures: Any) -> None:
        """What was used in all: ``peak_gb`` by the library's own account, ``process_gb`` of the whole
        process.
        """
        whole = process_peak() / 2**30
        self._say(peak_gb=self.peak() if self.peak else whole, process_gb=whole, **figures)

    def fail(self, error: Exception) -> None:
        """What went wrong, in one line."""
        first = (str(error).splitlines() or [""])[0]
        self._say(error=first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")

    def _say(self, **record: Any) -> None:
        print(json.dumps(record), file=self._out, flush=True)


def use_device(name: str) -> None:
    """Let MLX compute on the device of ``mlx-gpu`` or ``mlx-cpu``. Raises UserError where it is not there."""
    import mlx.core as mx

    device = mx.Device(mx.gpu if name == "mlx-gpu" else mx.cpu)
    if not mx.is_available(device):
        raise UserError(f"{name}: this machine has no such device")
    mx.set_default_device(device)


def open_engine(name: str) -> Any:
    """``mlx-gpu``, ``mlx-cpu`` or ``torch-cpu``. Raises UserError where it is not there."""
    from mlx_posttrain import engines

    engine = engines.get(name.partition("-")[0])
    if engine.name == "mlx":
        use_device(name)
    return engine


def untrained(model: Any, examples: Sequence[Example], batch_size: int) -> list[tuple[float, int]]:
    """Of each row the summed negative log-likelihood of its trained tokens, and their number: what a peer's
    first loss is held against.
    """
    from mlx_posttrain.data import batches

    found = []
    for begin in range(0, len(examples), batch_size):
        batch = batches.collate(examples[begin : begin + batch_size], model.context)
        rows = batches.by_row(batch, model.token_logprobs([batch])[0])
        found += [(-float(np.sum(row, dtype=np.float64)), len(row)) for row in rows]
    return found


def train(spec: dict[str, Any], gate: Gate) -> None:
    """A pass over the rows: sft, kl (all weights), lora, kl-lora (rank 16) or reward (neighbouring rows as
    pairs).
    """
    from mlx_posttrain.config import TrainSection
    from mlx_posttrain.data import pairs
    from mlx_posttrain.data.dataset import Data
    from mlx_posttrain.data.types import Preference
    from mlx_posttrain.engines.base import AdamW, AdapterSpec, hidden_size, initial_head
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
        model.add_head(initial_head(hidden_size(model.config), 0))
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
    first = {"rows": untrained(model, examples, shape.batch_size)} if spec.get("peers") else {}
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


def prompts(vocabulary: int) -> list[list[int]]:
    """Prompts to decode from: the first tokens of the benchmark's rows."""
    return [
        list(e.tokens[: sum(not t for t in e.trained)])
        for e in rows(Shape(rows=ROLLOUT["prompts"]), vocabulary)
    ]


def generate(spec: dict[str, Any], gate: Gate) -> None:
    """Sample 8 answers of 64 tokens to each of 4 prompts, in one decode batch or (``generate-single``) row by
    row.
    """
    engine = open_engine(spec["engine"])
    model = engine.load(Path(spec["folder"]))
    asked, samples = prompts(model.config["vocab_size"]), ROLLOUT["samples"]
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
            answers = model.generate(asked, samples=samples, **settings)
        else:
            answers = [
                model.generate([p], first_row=i * samples + s, **settings)[0]
                for i, p in enumerate(asked)
                for s in range(samples)
            ]
        logprobs = [p for a in answers for p in a.logprobs]
        gate.report(loss=-float(np.mean(logprobs)), rows=len(answers), tokens=len(logprobs))
    gate.close(device=engine.device())


def ppo(spec: dict[str, Any], gate: Gate) -> None:
    """One iteration: 32 answers of 64 tokens, scored by a reward model, and 2 epochs of updates of a policy
    and a separate critic.
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
    asked = [Question(tuple(p), "", {}) for p in prompts(policy.config["vocab_size"])]
    gate.peak = lambda: engine.memory()["peak_gb"]
    engine.reset_memory()
    step, first = 0, {}
    while gate.open():
        answers = rollouts.sample(
            policy,
            tokenizer,
            asked,
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
            recipe,
            *trainers,
            seen,
            losses,
            learning_rate("ppo"),
            step,
            policy.context,
            shares_prefixes=policy.shares_prefixes,
        )
        engine.synchronize()
        tokens = sum(len(a.tokens) for a in answers)
        entropy = seen.statistics["objective/entropy"] * len(answers) / tokens
        if step == 0:
            told = (("kl", "kl"), ("score", "scores"), ("score_std", "scores_std"))
            first = {"entropy": entropy, **{name: seen.statistics[f"objective/{key}"] for name, key in told}}
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
}


def main() -> None:
    """Do what the first argument says, as JSON; a failure is one line too."""
    spec, gate = json.loads(sys.argv[1]), Gate()
    try:
        from mlx_posttrain.bench import peers, scaling

        other = peers.WORK.get(peers.peer(spec["engine"]))
        work = other or {**WORK, "scaling": scaling.work}[spec["what"]]
        work(spec, gate)
    except Exception as error:
        gate.fail(error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
