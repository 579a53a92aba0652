"""Learning from rollouts: sample completions, score them, and update policy and critic on what they earned.

One step (Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF
with PPO"):

1. sample completions from the policy's full softmax, and score them;
2. measure log-probabilities and values in the forward pass that trains, so that the first ratio is 1;
  where a step has one update and nothing else asks for them, the update's own serve, and where the sampler
  computes in float32, its own may;
3. turn scores into per-token arrays: the method's ``experience``;
4. for each epoch, in a new order, minibatches of the method's loss, and of the value loss of a separate
  critic.

Dropout is off everywhere. What a method decides is in its :class:`~mlx_posttrain.training.method.Algorithm`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import Engine, Trainer
from mlx_posttrain.rewards.scorer import Scores
from mlx_posttrain.rl import kl, prompts, rollouts
from mlx_posttrain.rl.aggregation import aggregate
from mlx_posttrain.rl.config import RolloutRecipe
from mlx_posttrain.rl.evaluation import describe, evaluation, score_by_source
from mlx_posttrain.rl.experience import Actors, Experience, measure
from mlx_posttrain.rl.groups import equal_groups
from mlx_posttrain.rl.rollouts import Completion, Prompt
from mlx_posttrain.training.checks import check_warmup
from mlx_posttrain.training.method import Algorithm, Reference
from mlx_posttrain.training.optimizer import adamw

NORMALISE_ON = 256  # prompts at most, whose first completions say what a reward is centred and scaled by
GREEDY = (
    2**40
)  # added to a step's seed for its greedy completions, and times an attempt for those drawn again
PTX = "ptx"  # the loss term of rows that are imitated beside the updates


@dataclass
class RolloutData:
    """Prompts to complete in training, held-out ones, and rows to imitate beside the updates."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt] = ()
    ptx_examples: Sequence[Example] = ()
    #: Called once with the actors, when the reward's normalisation is known: sets a critic that began as a
    #: reward model to that model's share of the reward.
    calibrate_critic: Callable[[Actors], None] = field(default=lambda actors: None)


class RolloutLearner:
    """Policy and critic with their optimizers, and the prompts they learn from; see loop.Learner.

    stop: the token that ends a completion; None: those that end a text, see encode.stop_ids.
    """

    select_by = None
    finite = ("logps", "log-probability")

    def __init__(
        self,
        engine: Engine,
        actors: Actors,
        algorithm: Algorithm,
        recipe: RolloutRecipe,
        data: RolloutData,
        reference: Reference,
        sample: Callable[[dict[str, Any]], None],
        stop: int | None = None,
    ):
        self.actors, self.algorithm, self.recipe, self.data = actors, algorithm, recipe, data
        self.steps = recipe.train.steps
        self._reference = reference is not None
        self._write_sample = sample
        self._stop = stop
        settings = adamw(recipe.train)
        self.trainers: dict[str, Trainer] = {"optimizer": engine.trainer(actors.policy, settings)}
        if actors.critic is not None:
            self.trainers["critic_optimizer"] = engine.trainer(actors.critic, settings)
        section = recipe.kl
        self._controller = kl.controller(
            section.controller,
            section.beta,
            target=section.target,
            horizon=section.horizon,
            final=section.final,
            steps=self.steps,
        )
        self._baseline: float | None = None
        self._explain_from = 0
        self._last: Sequence[Completion] = ()
        self.last_scores = self._held_scores = Scores(np.zeros(0), {})
        self._held_out: Sequence[Completion] = ()

    def check(self) -> None:
        check_warmup(self.recipe.train, self.steps)
        if not self.data.held_out:
            log(
                "there are no held-out prompts: nothing is evaluated, and samples are answers to training "
                "prompts"
            )
        if self.algorithm.note:
            log(self.algorithm.note)

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        parts = {
            "training prompts": self.data.train,
            "held-out prompts": self.data.held_out,
            "ptx": self.data.ptx_examples,
        }
        # Of everything in the rows: a column that a reward function reads counts as much as the prompt.
        return {
            name: {"rows": len(rows), "hash": hashlib.sha256(repr(list(rows)).encode()).hexdigest()}
            for name, rows in parts.items()
        }

    def parameter_counts(self) -> tuple[int, int]:
        return self.actors.policy.parameter_counts()

    def trained_parameters(self) -> int:
        critic = self.actors.critic
        trained = self.actors.policy.parameter_counts()[1]
        return trained + (critic.parameter_counts()[1] if critic else 0)

    def prepare(self) -> None:
        pass

    def begin(self) -> None:
        """Normalise the rewards on the reference's completions, and calibrate the critic to them."""
        scorers = [s for s in (self.actors.scorer, self.actors.judge) if s.normalises]
        if scorers:
            first = prompts.order(len(self.data.train), self.recipe.seed, -1)[:NORMALISE_ON]
            completions = self._sample([self.data.train[i] for i in first], 1, self.recipe.seed + 1)
            for scorer in scorers:
                scorer.normalise_on(completions)
        self.data.calibrate_critic(self.actors)

    def _sample(
        self, asked: Sequence[Prompt], samples: int, seed: int, temperature: float | None = None
    ) -> list[Completion]:
        settings = self.recipe.rollout
        return rollouts.sample(
            self.actors.policy,
            self.actors.tokenizer,
            asked,
            samples=samples,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature if temperature is None else temperature,
            stop=stop_ids(self.actors.tokenizer) if self._stop is None else self._stop,
            seed=seed,
            token_budget=settings.token_budget,
        )

    def _measure(
        self, completions: Sequence[Completion], sampled: bool = False
    ) -> dict[str, list[np.ndarray]]:
        temperature = self.recipe.rollout.temperature
        return measure(self.actors, completions, temperature, self.recipe.train, self._reference, sampled)

    def step(self, step: int, lr: float) -> dict[str, float]:
        begun = time.perf_counter()
        recipe, beta = self.recipe, self._controller.beta
        seed = recipe.seed * 1_000_003 + step + 2
        self._last, scores, drawn_again = self._rollout(step, seed)
        self.last_scores = scores
        given: dict[str, Any] = {}
        if self.algorithm.greedy:
            given["greedy"] = self._greedy(seed)
        if self._baseline is not None:
            given["moving"] = self._baseline
        sampled = time.perf_counter()
        if self.algorithm.measured:
            stats = self._measure(self._last, self.algorithm.trusts_sampler)
        else:
            stats = {"old_logprobs": [np.array(c.logprobs) for c in self._last]}
        seen = self.algorithm.experience(
            self._last, scores.total, stats, beta, self.actors.value_offset, **given
        )
        metrics = self.update(seen, step, lr)
        self._controller.update(seen.kl, int(np.isfinite(scores.total).sum()))
        self._baseline = seen.baseline
        if seen.sentence and step >= self._explain_from:  # the same again only after twice as many steps
            log(f"step {step + 1}: {seen.sentence}")
            self._explain_from = 2 * step + 2
        return {
            "episode": (step + 1) * recipe.rollout.prompts * recipe.rollout.samples,
            "beta": beta,
            "tokens": sum(len(c.tokens) for c in seen.completions),
            **seen.metrics,
            **_of_parts(scores),
            **({"groups_drawn_again": drawn_again} if self.algorithm.resample else {}),
            **metrics,
            "seconds/rollout": sampled - begun,
        }

    def _rollout(self, step: int, seed: int) -> tuple[list[Completion], Scores, int]:
        """A step's completions with their scores, and how many groups of equal scores made way for others.

        A prompt is asked once a step; where no other is left, groups of equal scores stay.
        """
        train, samples = self.data.train, self.recipe.rollout.samples
        chosen = prompts.of_step(len(train), self.recipe.rollout.prompts, self.recipe.seed, step)
        completions = self._sample([train[i] for i in chosen], samples, seed)
        scores, drawn_again = self.actors.scorer.score(completions), 0
        groups, asked = np.repeat(np.arange(len(chosen)), samples), set(chosen)
        for attempt in range(self.algorithm.resample):
            shape = self.algorithm.shape
            compared = shape(scores.total, completions) if shape else scores.total
            equal = sorted(equal_groups(compared, groups))
            rng = np.random.default_rng([self.recipe.seed, 0xDA90, step, attempt])
            others = [i for i in rng.permutation(len(train)).tolist() if i not in asked][: len(equal)]
            if not others:
                break
            asked.update(others)
            fresh = self._sample([train[i] for i in others], samples, seed + (attempt + 2) * GREEDY)
            found = self.actors.scorer.score(fresh)
            for place, group in enumerate(equal[: len(others)]):
                old = slice(group * samples, (group + 1) * samples)
                new = slice(place * samples, (place + 1) * samples)
                completions[old] = [replace(c, group=group) for c in fresh[new]]
                scores.total[old] = found.total[new]
                for name, part in scores.parts.items():
                    part[old] = found.parts[name][new]
            drawn_again += len(others)
        return completions, scores, drawn_again

    def _greedy(self, seed: int) -> list[tuple[Completion, float]]:
        """The greedy completion of each group's prompt, with its score."""
        asked = [c.prompt for c in self._last[:: self.recipe.rollout.samples]]
        completions = self._sample(asked, 1, seed + GREEDY, temperature=0.0)
        return list(zip(completions, self.actors.scorer(completions).tolist(), strict=True))

    def update(self, experience: Experience, step: int, lr: float) -> dict[str, float]:
        """Passes of updates over one step's completions; returns means over the optimizer steps.

        Every pass has a new order, which depends on the recipe's seed and the step's number only. Without a
        completion to train on nothing is updated. Raises
        FloatingPointError as Trainer.step.
        """
        recipe, algorithm, policy = self.recipe, self.algorithm, self.actors.policy
        if not experience.completions:
            return {"loss/policy_avg": 0.0, "updates": 0}
        examples = [c.example for c in experience.completions]
        records: list[dict[str, float]] = []
        for epoch in range(algorithm.epochs):
            rng = np.random.default_rng([recipe.seed, 0x990, step, epoch])
            for micro in rollouts.minibatches(
                [e.tokens for e in examples],
                shares_prefixes=policy.shares_prefixes,
                batch_size=recipe.train.batch_size,
                grad_accumulation=recipe.train.grad_accumulation,
                token_budget=recipe.train.token_budget,
                rng=rng,
            ):
                batches = [
                    rollouts.collate_stats(
                        [examples[i] for i in rows],
                        {name: [values[i] for i in rows] for name, values in experience.stats.items()},
                        policy.context,
                    )
                    for rows in micro
                ]
                if algorithm.aggregation is not None:
                    batches = aggregate(batches, algorithm.aggregation, recipe.rollout.max_tokens)
                record: dict[str, float] = {}
                critic = self.trainers.get("critic_optimizer")
                if critic is not None and algorithm.value_loss is not None and algorithm.critic is not None:
                    critic_lr = algorithm.critic.lr * lr / recipe.train.lr if algorithm.critic.lr else lr
                    record |= _named(critic.step(algorithm.value_loss, batches, critic_lr), "val")
                if algorithm.ptx is not None:
                    order = rng.permutation(len(self.data.ptx_examples))[: algorithm.ptx.batch_size]
                    rows = [self.data.ptx_examples[i] for i in order]
                    batches.append(replace(collate(rows, policy.context), term=PTX))
                record |= _named(self.trainers["optimizer"].step(algorithm.loss, batches, lr), "policy")
                records.append(record)
                limit = algorithm.target_kl
                if limit is not None and record["policy/approxkl_avg"] > limit:
                    return _means(records)
        return _means(records)

    def headline(self, record: Mapping[str, float]) -> float:
        return record["loss/policy_avg"] if "loss/policy_avg" in record else record["policy/loss"]

    def advice(self, step: int) -> str:
        return "Start anew with a lower train.lr"

    def problem(self) -> str | None:
        stats = self._measure(self._last[:1])
        if all(np.isfinite(values).all() for rows in stats.values() for values in rows):
            return None
        return "log-probabilities or values under the weights that it made are not finite"

    def evaluate(self) -> dict[str, float] | None:
        asked = self.data.held_out or self.data.train[: self.recipe.sample.count]
        self._held_out = self._sample(asked, 1, self.recipe.seed) if asked else []
        self._held_scores = self.actors.scorer.score(self._held_out)
        if not self.data.held_out:
            return None
        stats = self._measure(self._held_out)
        metrics = evaluation(self._held_out, stats, self._held_scores.total, self.actors.judge)
        return metrics | score_by_source(self._held_out, self._held_scores.total)

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"held-out {describe(metrics)}"

    def write_samples(self, step: int) -> None:
        count, samples = self.recipe.sample.count, self.recipe.rollout.samples
        self._write_scored(step, self._held_out[:count], self._held_scores, {})
        if samples > 1 and count:  # what the last step compared: its first group
            self._write_scored(step, self._last[:samples], self.last_scores, {"split": "train"})

    def _write_scored(
        self, step: int, completions: Sequence[Completion], scores: Scores, more: Mapping[str, Any]
    ) -> None:
        for i, c in enumerate(completions):
            rewards = {name: _number(part[i]) for name, part in scores.parts.items()}
            self._write_sample(
                {
                    "step": step,
                    **more,
                    "prompt": c.prompt.text,
                    "answer": c.text,
                    "stopped": c.stopped,
                    "score": _number(scores.total[i]),
                    "rewards": rewards,
                }
            )

    def save(self, folder: Path) -> None:
        self.actors.policy.save(folder / "weights")
        if self.actors.critic is not None:
            self.actors.critic.save(folder / "critic")
        for name, trainer in self.trainers.items():
            trainer.save(folder / f"{name}.safetensors")

    def load(self, folder: Path) -> None:
        self.actors.policy.load_trained(folder / "weights")
        if self.actors.critic is not None:
            self.actors.critic.load_trained(folder / "critic")
        for name, trainer in self.trainers.items():
            trainer.load(folder / f"{name}.safetensors")

    def save_model(self, folder: Path) -> None:
        self.actors.policy.save(folder)

    def load_model(self, folder: Path) -> None:
        self.actors.policy.load_trained(folder)

    def state(self) -> dict[str, Any]:
        return {
            "controller": self._controller.state(),
            "scorer": self.actors.scorer.state(),
            "judge": self.actors.judge.state(),
            "value_offset": self.actors.value_offset,
            "baseline": self._baseline,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._controller.restore(state["controller"])
        self.actors.scorer.restore(state["scorer"])
        self.actors.judge.restore(state["judge"])
        self.actors.value_offset = state["value_offset"]
        self._baseline = state.get("baseline")


def _number(value: float) -> float | None:
    """A score for JSON, which has no nan."""
    return float(value) if np.isfinite(value) else None


def _of_parts(scores: Scores) -> dict[str, float]:
    """Mean and standard deviation of each reward's own scores, under TRL's names."""
    found = {}
    for name, part in scores.parts.items():
        known = part[np.isfinite(part)]
        if len(known):
            found[f"rewards/{name}/mean"] = float(known.mean())
            found[f"rewards/{name}/std"] = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return found


def _named(metrics: Mapping[str, float], party: str) -> dict[str, float]:
    """Metrics under TRL's names: a trainer's own, which have no group, get ``party``."""
    return {
        name if "/" in name or name in ("ratio_squared", "entropy", "kl") else f"{party}/{name}": value
        for name, value in metrics.items()
    }


def _means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    metrics = {name: float(np.mean([r[name] for r in records])) for name in records[0]}
    if "ratio_squared" in metrics:
        metrics["val/ratio_var"] = max(0.0, metrics.pop("ratio_squared") - metrics["val/ratio"] ** 2)
    return metrics | {"updates": len(records)}
