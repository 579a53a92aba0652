"""What a PPO recipe may say beyond data and model: one section for each part of the algorithm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mlx_posttrain import config


class RolloutSection(config.Section):
    """How answers are sampled: from the full softmax, no top-k, no top-p, no repetition penalty."""

    prompts: int = Field(16, ge=1, description="distinct prompts in a step")
    samples: int = Field(1, ge=1, description="answers to each prompt")
    max_tokens: int = Field(64, ge=1, description="longest answer in tokens, the stop token included")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of every log-probability")
    missing_eos_penalty: float | None = Field(
        1.0, ge=0, description="taken from the score of an answer that did not end by itself; null: none"
    )
    missing_eos_score: float | None = Field(
        None,
        description="score of an answer that did not end by itself, whatever it says, in place of the "
        "penalty; null: the penalty",
    )
    token_budget: int = Field(
        16384,
        ge=32,
        description="cached positions of one decode batch: rows times prompt plus answer, in blocks of 256; "
        "of GPT-2 124M 1.2 GB",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> RolloutSection:
        default = type(self).model_fields["missing_eos_penalty"].default
        if self.missing_eos_score is not None and self.missing_eos_penalty not in (None, default):
            raise ValueError("missing_eos_score takes the place of missing_eos_penalty: give one of the two")
        return self


class PPOSection(config.Section):
    """The objective."""

    epochs: int = Field(2, ge=1, description="passes over each step's answers")
    clip: float = Field(0.2, gt=0, description="how far a token's ratio may move before its gradient stops")
    value_clip: float | None = Field(
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


class KLSection(config.Section):
    """The leash to the reference: the policy as it was before PPO (with an adapter: without it)."""

    controller: Literal["fixed", "adaptive"] = Field("fixed", description="beta stays, or follows the KL")
    beta: float = Field(0.05, ge=0, description="penalty per nat; the first value of an adaptive one")
    target: float = Field(6.0, gt=0, description="adaptive: nats per answer aimed at")
    horizon: float = Field(
        10000.0, gt=0, description="adaptive: answers over which beta may change by a fifth"
    )


class CriticSection(config.Section):
    """What predicts the return."""

    kind: Literal["separate", "shared"] = Field(
        "separate", description="a network of its own, or a zero head on the policy's trunk"
    )
    init: Literal["auto", "reward", "policy"] = Field(
        "auto",
        description="a separate critic starts as a copy of the first reward model, or of the policy with a "
        "zero head; auto: the first if there is one",
    )
    lr: float | None = Field(None, gt=0, description="a separate critic's learning rate; null: train.lr")


class PTXSection(config.Section):
    """Rows imitated beside the updates, against forgetting (PPO-ptx: Ouyang et al. 2022, eq. 2)."""

    data: config.DataSection
    coefficient: float = Field(
        27.8, ge=0, description="weight of their mean negative log-likelihood per token"
    )
    batch_size: int = Field(4, ge=1, description="rows beside each optimizer step")


class PPOTrainSection(config.OptimizerSection):
    """The optimizer and its loop, with PPO's own defaults."""

    steps: int = Field(150, ge=1, description="rollouts, each followed by ppo.epochs passes of updates")
    batch_size: int = Field(4, ge=1, description="answers in a micro-batch")
    accumulate: int = Field(4, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(5e-6, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="shape after the warm-up")
    warmup: float = Field(
        0.0, ge=0, description="warm-up: a share of all steps below 1, or a number of steps"
    )
    eps: float = Field(1e-5, gt=0, description="AdamW's epsilon")
    clip: float | None = Field(0.5, gt=0, description="largest global gradient norm; null: no clipping")
    keep: int = Field(2, ge=1, description="checkpoints kept")
