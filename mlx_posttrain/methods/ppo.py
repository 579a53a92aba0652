"""PPO from a reward: answer, score, and make better answers likelier, while the policy stays near its
reference.

One step (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024, "The N+
Implementation Details of RLHF with PPO"):

1. sample answers from the policy's full softmax;
2. per token, reward = -beta (log pi - log ref), and on the last token the score;
3. advantages by GAE from the critic's values, whitened over all real tokens;
4. for each epoch, in a new order, minibatches of the clipped objective (Schulman et al. 2017, eq. 7) and of
  the clipped value loss.

Old log-probabilities come from the forward pass that trains, not from the one that sampled, so the first
ratio is 1. Dropout is off everywhere. The pure parts are in losses/ppo.py (what is differentiated) and rl/
(what is not); this file is the loop.

Where we differ: losses are averaged over all tokens of an optimizer step rather than per micro-batch; the
score is on the last real token (TRL puts it one slot later where there is room); a separate critic has its
own optimizer, so ``vf_coef`` weighs the two losses on a shared trunk only; the learning rate follows the
steps, not the optimizer's updates.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mlx_posttrain import config, engines, runs
from mlx_posttrain.console import Progress, interrupted, interruptible, say
from mlx_posttrain.convert.files import require_space
from mlx_posttrain.data import batches as data_batches
from mlx_posttrain.data import encode
from mlx_posttrain.data.read import encode_rows, read_conversations
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import (
    Array,
    DeviceBatch,
    Engine,
    Loss,
    Model,
    Trainer,
    hidden_size,
    initial_head,
)
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses import policy as objective
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import check_vocabulary, load_tokenizer
from mlx_posttrain.rewards import scorer as scoring
from mlx_posttrain.rl import kl, prompts, rollouts
from mlx_posttrain.rl.experience import Experience, Parties, experience, measure
from mlx_posttrain.rl.rollouts import Answer, Question
from mlx_posttrain.rl.settings import (
    CriticSection,
    KLSection,
    PPOSection,
    PPOTrainSection,
    PTXSection,
    RolloutSection,
)
from mlx_posttrain.training import setup
from mlx_posttrain.training.checks import blown_up, check_warmup, not_finite, same_data, tell_compiled
from mlx_posttrain.training.loop import adamw
from mlx_posttrain.training.schedule import learning_rate

NORMALISED_ON = 256  # prompts, at most


class Recipe(config.Recipe):
    """PPO against a reward."""

    method: Literal["ppo"] = Field(description="ppo: answer, score, improve")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    reward: list[scoring.RewardEntry] = Field(
        min_length=1, description="what answers are scored by, summed with weights"
    )
    judge: list[scoring.RewardEntry] = Field(
        default_factory=list,
        description="scored at evaluations only: a second opinion, to see whether the reward is being fooled",
    )
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection())
    ppo: PPOSection = Field(default_factory=lambda: PPOSection())
    kl: KLSection = Field(default_factory=lambda: KLSection())
    critic: CriticSection = Field(default_factory=lambda: CriticSection())
    ptx: PTXSection | None = Field(None, description="rows imitated beside the updates; null: none")
    train: PPOTrainSection = Field(default_factory=lambda: PPOTrainSection())  # type: ignore[assignment]

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_one_way_of_asking(self.data, self.sample, "prompts")
        config.check_training(self)
        if self.critic.kind == "shared" and (self.critic.lr is not None or self.critic.init != "auto"):
            raise ValueError("critic.lr and critic.init belong to a separate critic")
        if self.critic.kind == "separate" and self.ppo.vf_coef != PPOSection.model_fields["vf_coef"].default:
            raise ValueError(
                "ppo.vf_coef weighs the losses of a shared trunk: a separate critic has an optimizer of its "
                "own, so set critic.lr"
            )
        if self.kl.controller == "fixed" and any(
            getattr(self.kl, k) != KLSection.model_fields[k].default for k in ("target", "horizon")
        ):
            raise ValueError(
                "kl.target and kl.horizon belong to kl.controller=adaptive: the fixed one keeps beta"
            )
        if self.critic.init == "reward" and not any(entry.model for entry in self.reward):
            raise ValueError("critic.init=reward needs a reward model among `reward`")
        if self.adapter is not None and self.adapter.path is not None:
            raise ValueError(
                "adapter.path: the reference would be the model without it; give the adapter's "
                "run as `model` instead"
            )
        if self.adapter is not None and self.adapter.dropout:
            raise ValueError(
                "adapter.dropout must be 0: with dropout the ratio of new to old policy is noise"
            )
        return self


# What is differentiated


def policy_loss(recipe: Recipe) -> Loss:
    """The clipped objective over a minibatch; with a shared critic its value loss too; for rows of ``ptx``
    their likelihood.
    """
    settings, temperature = recipe.ppo, recipe.rollout.temperature
    coefficient = recipe.ptx.coefficient if recipe.ptx else 0.0

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        def mean(values: Array) -> Array:
            return token_mean(values, batch.weight, batch.total)

        if "advantage" not in batch.extra:
            nll = mean(-model.logprobs(batch))
            return coefficient * nll, {"loss/ptx_avg": nll}
        logprobs, entropy, values = model.policy_terms(batch, temperature)
        mask, extra = batch.weight, batch.extra
        total = policy = mean(
            objective.clipped_policy(logprobs, extra["old"], extra["advantage"], mask, settings.clip)
        )
        seen = objective.update_statistics(logprobs, extra["old"], extra["advantage"], mask, settings.clip)
        metrics = {
            "loss/policy_avg": policy,
            "policy/entropy_avg": mean(entropy),
            "policy/approxkl_avg": mean(seen["approx_kl"]),
            "policy/clipfrac_avg": mean(seen["clip_fraction"]),
            "val/ratio": mean(seen["ratio"]),
            "ratio_squared": mean(seen["ratio"] ** 2),
        }
        if values is not None:
            value, figures = _value_terms(values, batch, settings.value_clip)
            total, metrics = policy + settings.vf_coef * value, metrics | figures
        return total, metrics

    return loss


def value_loss(clip: float | None) -> Loss:
    """The clipped value loss of a separate critic."""

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        return _value_terms(model.scores(batch), batch, clip)

    return loss


def _value_terms(values: Array, batch: DeviceBatch, clip: float | None) -> tuple[Array, dict[str, Array]]:
    extra = batch.extra
    value = token_mean(
        objective.clipped_value(values, extra["old_value"], extra["return"], batch.weight, clip),
        batch.weight,
        batch.total,
    )
    clipped = objective.value_clip_fraction(values, extra["old_value"], extra["return"], batch.weight, clip)
    return value, {
        "loss/value_avg": value,
        "val/clipfrac_avg": token_mean(clipped, batch.weight, batch.total),
    }


# One step's updates


def update(
    recipe: Recipe,
    trainer: Trainer,
    critic: Trainer | None,
    seen: Experience,
    losses: tuple[Loss, Loss],
    lr: float,
    step: int,
    context: int | None,
    beside: Sequence[Example] = (),
    packs: bool = False,
) -> dict[str, float]:
    """``ppo.epochs`` passes of updates over one step's answers; returns means over the optimizer steps.
    ``packs``: as the policy's.

    Every epoch has a new order, which depends on the recipe's seed and the step's number only. Raises
    FloatingPointError as Trainer.step.
    """
    train, examples = recipe.train, [a.example for a in seen.answers]
    policy, value = losses
    records: list[dict[str, float]] = []
    for epoch in range(recipe.ppo.epochs):
        rng = np.random.default_rng([recipe.seed, 0x990, step, epoch])
        for micro in rollouts.minibatches(
            [e.tokens for e in examples],
            packs=packs,
            batch_size=train.batch_size,
            accumulate=train.accumulate,
            token_budget=train.token_budget,
            rng=rng,
        ):
            batches = [
                rollouts.with_figures(
                    [examples[i] for i in rows],
                    {n: [v[i] for i in rows] for n, v in seen.figures.items()},
                    context,
                )
                for rows in micro
            ]
            record = (
                {}
                if critic is None
                else _named(
                    critic.step(value, batches, recipe.critic.lr * lr / train.lr if recipe.critic.lr else lr),
                    "val",
                )
            )
            if recipe.ptx is not None:
                rows = [beside[i] for i in rng.permutation(len(beside))[: recipe.ptx.batch_size]]
                batches.append(replace(data_batches.collate(rows, context), group="ptx"))
            record |= _named(trainer.step(policy, batches, lr), "policy")
            records.append(record)
            if recipe.ppo.target_kl is not None and record["policy/approxkl_avg"] > recipe.ppo.target_kl:
                return _means(records)
    return _means(records)


def _named(metrics: dict[str, float], party: str) -> dict[str, float]:
    return {
        name if "/" in name or name == "ratio_squared" else f"{party}/{name}": value
        for name, value in metrics.items()
    }


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    found = {name: float(np.mean([r[name] for r in records])) for name in records[0]}
    found["val/ratio_var"] = max(0.0, found.pop("ratio_squared") - found["val/ratio"] ** 2)
    return found | {"updates": len(records)}


# The run


def run(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run the recipe to the end; returns the figures of the last evaluation. Errors as supervised.run."""
    engine, run = setup.begin(recipe, resume)
    with setup.setting_up(run, resume):
        folder = base_folder(recipe.model)
        tokenizer = load_tokenizer(folder)
        policy = setup.load_model(engine, recipe, folder, recipe.adapter)
        if policy.has_head:
            raise UserError(f"{recipe.model} is a reward model: the policy of PPO is a language model")
        check_vocabulary(tokenizer, policy, folder)
        check_warmup(recipe.train, recipe.train.steps)
        questions, held_out = prompts.read(
            recipe.data, tokenizer, policy.context, recipe.rollout.max_tokens, recipe.seed
        )
        # before reference, critic and scorers are there
        plans.tell(lambda: _plan(recipe, engine.name, folder, questions, held_out))
        beside = _ptx_rows(recipe, tokenizer, policy.context)
        policy.keep_reference()
        parties = Parties(
            policy,
            _critic(engine, recipe, folder, policy),
            tokenizer,
            scoring.Scorer(recipe.reward, engine, tokenizer, str(recipe.data.template)),
            scoring.Scorer(recipe.judge, engine, tokenizer, str(recipe.data.template)),
        )
        longest = max(len(q.tokens) for q in [*questions, *held_out]) + recipe.rollout.max_tokens
        # a critic reads as far as the policy or the reward model that it is a copy of
        for scorer in (parties.scorer, parties.judge):
            scorer.check_context(longest)
        if not held_out:
            say(
                "there are no held-out prompts: nothing is evaluated, and samples are answers to training "
                "prompts"
            )
        setup.announce(recipe, engine, policy)
    engine.seed(recipe.seed)
    result = fit(engine, parties, questions, held_out, beside, recipe, run, resume)

    def write(target: Path) -> None:
        policy.save(target)
        # a value head is of no use to whoever runs the model
        (target / files.HEAD_FILE).unlink(missing_ok=True)

    setup.finish(run, result, write)
    what = (
        f"score {result['score']:.3f}, KL {result['kl']:.2f} nats per answer"
        if held_out
        else "metrics.jsonl has the training answers' scores and KL"
    )
    say(f"{run.final} is written: {what}")
    return result


def plan(recipe: Recipe) -> list[plans.Plan]:
    """What the recipe would take; makes no run directory and loads no weights. Raises UserError as reading
    the data does.
    """
    folder = locate(recipe.model).folder
    found = prompts.read(
        recipe.data,
        load_tokenizer(folder),
        plans.size(folder).context,
        recipe.rollout.max_tokens,
        recipe.seed,
    )
    return [_plan(recipe, engines.get(recipe.engine).name, folder, *found)]


def _plan(
    recipe: Recipe, engine: str, folder: Path, questions: Sequence[Question], held_out: Sequence[Question]
) -> plans.Plan:
    training, ahead, unseen = (
        [len(q.tokens) for q in asked]
        for asked in (questions, _normalised_on(questions, recipe.seed), held_out)
    )
    scorers = [
        plans.size(locate(entry.model).folder) for entry in [*recipe.reward, *recipe.judge] if entry.model
    ]
    return plans.of_ppo(
        recipe, engine, plans.size(folder), plans.PromptLengths(max(training), ahead, unseen), scorers
    )


def _normalised_on(questions: Sequence[Question], seed: int) -> list[Question]:
    """The training prompts whose first answers say what a reward is centred and scaled by."""
    return [questions[i] for i in prompts.order(len(questions), seed, -1)[:NORMALISED_ON]]


def _critic_source(recipe: Recipe) -> str | None:
    """The reward model that a separate critic starts as a copy of; None when it starts as the policy."""
    if recipe.critic.kind == "shared" or recipe.critic.init == "policy":
        return None
    return next((entry.model for entry in recipe.reward if entry.model), None)


def _critic(engine: Engine, recipe: Recipe, folder: Path, policy: Model) -> Model | None:
    if recipe.critic.kind == "shared":
        policy.add_head(initial_head(hidden_size(policy.config), None))
        return None
    reward = _critic_source(recipe)
    critic = engine.load(
        base_folder(reward) if reward else folder, gradient_checkpointing=recipe.train.gradient_checkpointing
    )
    if not critic.has_head:
        critic.add_head(initial_head(hidden_size(critic.config), None))
    return critic


def _fit_critic(parties: Parties, reward: str | None) -> None:
    """Let a critic that started as a reward model say what that model adds to the sum of rewards; what others
    add it has to learn.
    """
    if parties.critic is not None and reward is not None:
        factor, parties.value_offset = parties.scorer.share_of(reward)
        parties.critic.add_head(parties.critic.head() * np.float32(factor))


def _ptx_rows(recipe: Recipe, tokenizer: Any, context: int | None) -> list[Example]:
    if recipe.ptx is None:
        return []
    data = recipe.ptx.data
    rows = read_conversations(data, split=data.split, limit=data.limit, seed=recipe.seed)
    return encode_rows(rows, data, tokenizer, context, recipe.seed, "ptx rows")


def _fingerprint(rows: Sequence[Question] | Sequence[Example]) -> dict[str, Any]:
    """Of everything in the rows: a column that a reward function reads counts as much as the prompt."""
    return {"rows": len(rows), "hash": hashlib.sha256(repr(list(rows)).encode()).hexdigest()}


def fit(
    engine: Engine,
    parties: Parties,
    questions: list[Question],
    held_out: list[Question],
    beside: list[Example],
    recipe: Recipe,
    run: runs.Run,
    resume: bool = False,
) -> dict[str, float]:
    """Train to the end; returns the last evaluation. A resumed run gives the figures of one that was not
    interrupted.
    """
    train, policy, critic = recipe.train, parties.policy, parties.critic
    trainer = engine.trainer(policy, adamw(train))
    critic_trainer = engine.trainer(critic, adamw(train)) if critic is not None else None
    losses = (policy_loss(recipe), value_loss(recipe.ppo.value_clip))
    controller = kl.controller(recipe.kl.controller, recipe.kl.beta, recipe.kl.target, recipe.kl.horizon)
    eval_every = train.eval_every or max(1, train.steps // 10)
    save_every = train.save_every or eval_every
    needed = 12 * (policy.parameter_counts()[1] + (critic.parameter_counts()[1] if critic else 0)) + 2**20
    first = 0
    state: dict[str, Any] = {
        "evaluation": {},
        "controller": controller.state(),
        "scorer": {},
        "judge": {},
        "value_offset": 0.0,
    }

    state["data"] = {
        "training": _fingerprint(questions),
        "held-out": _fingerprint(held_out),
        "ptx": _fingerprint(beside),
    }
    newest = run.newest_checkpoint() if resume else None
    if newest is not None:
        same_data(newest.state["data"], state["data"], run)
        first, state = newest.state["step"], {name: newest.state[name] for name in state}
        policy.load_trained(newest.folder / "weights")
        trainer.load(newest.folder / "optimizer.safetensors")
        if critic is not None and critic_trainer is not None:
            critic.load_trained(newest.folder / "critic")
            critic_trainer.load(newest.folder / "critic_optimizer.safetensors")
        engine.set_random_state(newest.arrays)
        controller.restore(state["controller"])
        parties.scorer.restore(state["scorer"])
        parties.judge.restore(state["judge"])
        parties.value_offset = state["value_offset"]
    if resume:
        run.truncate_logs(first if first else -1)

    def answer(asked: Sequence[Question], samples: int, seed: int) -> list[Answer]:
        r = recipe.rollout
        return rollouts.sample(
            policy,
            parties.tokenizer,
            asked,
            samples=samples,
            max_tokens=r.max_tokens,
            temperature=r.temperature,
            stop=encode.eos_id(parties.tokenizer),
            seed=seed,
            token_budget=r.token_budget,
        )

    def checkpoint(done: int, answers: Sequence[Answer]) -> None:
        figures = measure(parties, answers[:1], recipe.rollout.temperature, train, policy.context)
        if not all(np.isfinite(values).all() for rows in figures.values() for values in rows):
            raise blown_up(
                done, "log-probabilities or values under the weights that it made are not finite", run
            )
        require_space(run.folder, needed)

        def write(folder: Path) -> None:
            policy.save(folder / "weights")
            trainer.save(folder / "optimizer.safetensors")
            if critic is not None and critic_trainer is not None:
                critic.save(folder / "critic")
                critic_trainer.save(folder / "critic_optimizer.safetensors")

        run.save_checkpoint(
            done, write, state | {"controller": controller.state()}, engine.random_state(), train.keep
        )

    def evaluate(done: int) -> None:
        asked = held_out or questions[: recipe.sample.count]
        if not asked:
            return
        answers = answer(asked, 1, recipe.seed)
        if held_out:
            figures = measure(parties, answers, recipe.rollout.temperature, train, policy.context)
            state["evaluation"] = {
                **scoring.evaluation(answers, figures, parties.scorer, parties.judge),
                "step": done,
            }
            if not np.isfinite(state["evaluation"]["kl"]):
                raise blown_up(done, f"the held-out KL is {state['evaluation']['kl']}", run)
            run.log({"step": done, **{f"eval/{k}": v for k, v in state["evaluation"].items() if k != "step"}})
            progress.note(f"step {done}: held-out " + scoring.sentence(state["evaluation"]))
        scores = parties.scorer(answers[: recipe.sample.count]) if recipe.sample.count else ()
        for a, score in zip(answers, scores, strict=False):
            run.sample(
                {
                    "step": done,
                    "prompt": a.question.text,
                    "answer": a.text,
                    "stopped": a.stopped,
                    "score": float(score),
                }
            )

    require_space(run.folder, needed)
    progress = Progress(run.folder.name, train.steps, first)
    engine.reset_memory()
    try:
        with interruptible(run.folder) as signals:
            if first == 0:
                reference = answer(_normalised_on(questions, recipe.seed), 1, recipe.seed + 1)
                parties.scorer.normalise_on(reference)
                parties.judge.normalise_on(reference)
                _fit_critic(parties, _critic_source(recipe))
                state |= {
                    "scorer": parties.scorer.state(),
                    "judge": parties.judge.state(),
                    "value_offset": parties.value_offset,
                }
                evaluate(0)
            for step in range(first, train.steps):
                begun = time.perf_counter()
                chosen = prompts.of_step(len(questions), recipe.rollout.prompts, recipe.seed, step)
                answers = answer(
                    [questions[i] for i in chosen], recipe.rollout.samples, recipe.seed * 1_000_003 + step + 2
                )
                sampled = time.perf_counter()
                beta = controller.beta
                seen = experience(
                    answers,
                    parties.scorer(answers),
                    measure(parties, answers, recipe.rollout.temperature, train, policy.context),
                    recipe.ppo,
                    recipe.rollout.missing_eos_penalty,
                    beta,
                    parties.value_offset,
                    recipe.rollout.missing_eos_score,
                )
                lr = learning_rate(
                    step,
                    steps=train.steps,
                    peak=train.lr,
                    schedule=train.schedule,
                    warmup=train.warmup,
                    floor=train.min_lr,
                )
                try:
                    figures = update(
                        recipe,
                        trainer,
                        critic_trainer,
                        seen,
                        losses,
                        lr,
                        step,
                        policy.context,
                        beside,
                        policy.packs,
                    )
                except FloatingPointError as error:
                    raise not_finite(step, error, run, "Start anew with a lower train.lr") from None
                controller.update(seen.statistics["objective/kl"], len(seen.answers))
                done, memory = step + 1, engine.memory()
                tokens = sum(len(a.tokens) for a in seen.answers)
                run.log(
                    {
                        "step": done,
                        "episode": done * recipe.rollout.prompts * recipe.rollout.samples,
                        "lr": lr,
                        "beta": beta,
                        "tokens": tokens,
                        **seen.statistics,
                        **figures,
                        "seconds/rollout": sampled - begun,
                        "seconds": time.perf_counter() - begun,
                        **memory,
                    }
                )
                progress.update(done, figures["loss/policy_avg"], tokens, memory["peak_gb"])
                if done % eval_every == 0 or done == train.steps:
                    evaluate(done)
                if done % save_every == 0 or done == train.steps or signals:
                    checkpoint(done, answers)
                if signals and done < train.steps:
                    raise interrupted(signals, done, run.folder)
    finally:
        progress.close()
    tell_compiled(*[t for t in (trainer, critic_trainer) if t is not None])
    total, trained = policy.parameter_counts()
    return {**state["evaluation"], "parameters": total, "trained_parameters": trained}
