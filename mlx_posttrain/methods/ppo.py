"""PPO: make answers that score higher likelier, while the policy stays near its reference.

One step (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024, "The N+
Implementation Details of RLHF with PPO"):

1. sample answers from the policy's full softmax;
2. per token, reward = -beta (log pi - log ref), and on the last token the score;
3. advantages by GAE from the critic's values, whitened over all real tokens;
4. for each epoch, in a new order, minibatches of the clipped objective (Schulman et al. 2017, eq. 7) and
   of the clipped value loss.

Old log-probabilities come from the forward pass that trains, so the first ratio is 1. In float32 those of the
sampler are the same but for rounding, about 1e-6, and save a pass; they are measured where they may differ
(``Model.exact_sampler``), and with a critic on the policy's trunk, which needs that pass. Dropout is off
everywhere. The pure parts are in losses/policy.py (what is differentiated) and rl/ (what is not);
rl/learner.py is the step.

Where we differ: losses are averaged over all tokens of an optimizer step rather than per micro-batch; the
score is on the last real token (TRL puts it one slot later where there is room); a separate critic has its
own optimizer, so ``vf_coef`` weighs the two losses on a shared trunk only; the learning rate follows the
steps, not the optimizer's updates.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.losses import policy as objective
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.rl.config import CriticSection, PTXSection, RolloutRecipe
from mlx_posttrain.rl.experience import experience
from mlx_posttrain.training.method import Algorithm, Method


class PPOSection(config.Section):
    """The objective."""

    epochs: int = Field(2, ge=1, description="passes over each step's answers")
    clip_range: float = Field(
        0.2, gt=0, description="how far a token's ratio may move before its gradient stops"
    )
    clip_range_value: float | None = Field(
        0.2, gt=0, description="how far a value may move from the old one; null: no clipping"
    )
    vf_coef: float = Field(0.1, ge=0, description="weight of the value loss on a shared trunk")
    gamma: float = Field(1.0, gt=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE")
    whiten_rewards: bool = Field(False, description="also whiten per-token rewards, keeping their mean")
    score_clip: float | None = Field(
        None, gt=0, description="scores are held within +- this; null: as they are"
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="end a step's updates when approx-KL to the old policy passes this; null: never",
    )


class Recipe(RolloutRecipe):
    """PPO against a reward."""

    method: Literal["ppo"] = Field(description="ppo: answer, score, improve")
    ppo: PPOSection = Field(default_factory=lambda: PPOSection())
    critic: CriticSection = Field(default_factory=lambda: CriticSection())
    ptx: PTXSection | None = Field(None, description="rows imitated beside the updates; null: none")

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.critic.kind == "shared" and (self.critic.lr is not None or self.critic.init != "auto"):
            raise ValueError("critic.lr and critic.init belong to a separate critic")
        if self.critic.kind == "separate" and self.ppo.vf_coef != PPOSection.model_fields["vf_coef"].default:
            raise ValueError(
                "ppo.vf_coef weighs the losses of a shared trunk: a separate critic has an optimizer of its "
                "own, so set critic.lr"
            )
        if self.critic.init == "reward" and not any(entry.model for entry in self.reward):
            raise ValueError("critic.init=reward needs a reward model among `reward`")
        return self


def policy_loss(recipe: Recipe) -> Loss:
    """The clipped objective over a minibatch; with a shared critic its value loss too.

    For the rows of ``ptx`` it is their negative log-likelihood, with its coefficient.
    """
    settings, temperature = recipe.ppo, recipe.rollout.temperature
    coefficient = recipe.ptx.coefficient if recipe.ptx else 0.0

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        mask, extra = batch.mask, batch.extra

        def mean(values: Array) -> Array:
            return token_mean(values, mask, batch.total)

        if "advantages" not in extra:
            nll = mean(-model.logprobs(batch))
            return coefficient * nll, {"loss/ptx_avg": nll}
        logprobs, entropy, values = model.policy_terms(batch, temperature)
        terms = (logprobs, extra["old_logprobs"], extra["advantages"], mask, settings.clip_range)
        total = policy = mean(objective.clipped_policy(*terms))
        stats = objective.update_statistics(*terms)
        metrics = {
            "loss/policy_avg": policy,
            "policy/entropy_avg": mean(entropy),
            "policy/approxkl_avg": mean(stats["approx_kl"]),
            "policy/clipfrac_avg": mean(stats["clip_fraction"]),
            "val/ratio": mean(stats["ratio"]),
            "ratio_squared": mean(stats["ratio"] ** 2),
        }
        if values is not None:
            value, value_metrics = _value_terms(values, batch, settings.clip_range_value)
            total, metrics = policy + settings.vf_coef * value, metrics | value_metrics
        return total, metrics

    return loss


def value_loss(clip: float | None) -> Loss:
    """The clipped value loss of a separate critic."""

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        return _value_terms(model.scores(batch), batch, clip)

    return loss


def _value_terms(values: Array, batch: DeviceBatch, clip: float | None) -> tuple[Array, dict[str, Array]]:
    terms = (values, batch.extra["old_values"], batch.extra["returns"], batch.mask, clip)
    value = token_mean(objective.clipped_value(*terms), batch.mask, batch.total)
    clipped = token_mean(objective.value_clip_fraction(*terms), batch.mask, batch.total)
    return value, {"loss/value_avg": value, "val/clipfrac_avg": clipped}


def algorithm(recipe: Recipe) -> Algorithm:
    """PPO as rl/learner.py runs it."""
    settings, rollout = recipe.ppo, recipe.rollout
    return Algorithm(
        loss=policy_loss(recipe),
        experience=partial(
            experience,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
            score_clip=settings.score_clip,
            missing_eos_penalty=rollout.missing_eos_penalty,
            missing_eos_score=rollout.missing_eos_score,
        ),
        value_loss=value_loss(settings.clip_range_value),
        epochs=settings.epochs,
        target_kl=settings.target_kl,
        trusts_sampler=True,
        critic=recipe.critic,
        ptx=recipe.ptx,
    )


METHOD = Method(
    name="ppo",
    summary="PPO with a value network against reward models or reward functions",
    Recipe=Recipe,
    algorithm=algorithm,
    reference=lambda recipe: "logprobs",
    bench={"ppo": {}},
)
