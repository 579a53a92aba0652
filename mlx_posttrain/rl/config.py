"""What a recipe of a method on rollouts may say beyond data and model: a section for each part."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.rewards.scorer import RewardEntry


class RolloutSection(config.Section):
    """How answers are sampled: from the full softmax, no top-k, no top-p, no repetition penalty."""

    prompts: int = Field(16, ge=1, description="prompts in a step")
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


class KLPenaltySection(config.Section):
    """The leash to the reference: the policy as it was before PPO (with an adapter: without it)."""

    controller: Literal["fixed", "adaptive", "linear"] = Field(
        "fixed", description="beta stays, follows the KL, or goes in a line to `final`"
    )
    beta: float = Field(0.05, ge=0, description="penalty per nat; the first value where it changes")
    target: float = Field(6.0, gt=0, description="adaptive: nats per answer aimed at")
    horizon: float = Field(
        10000.0, gt=0, description="adaptive: answers over which beta may change by a fifth"
    )
    final: float = Field(0.0, ge=0, description="linear: penalty per nat in the last step")


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

    @model_validator(mode="after")
    def _no_vocabulary_of_its_own(self) -> PTXSection:
        if self.data.special_tokens:
            raise ValueError("data.special_tokens here has no effect: name them in the recipe's own data")
        return self


class RolloutTrainSection(config.OptimizerSection):
    """The optimizer and its loop, with the defaults of RL."""

    steps: int = Field(150, ge=1, description="rollouts, each followed by passes of updates")
    batch_size: int = Field(4, ge=1, description="answers in a micro-batch")
    grad_accumulation: int = Field(4, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(5e-6, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="shape after the warm-up")
    warmup: float = Field(
        0.0, ge=0, description="warm-up: a share of all steps below 1, or a number of steps"
    )
    eps: float = Field(1e-5, gt=0, description="AdamW's epsilon")
    max_grad_norm: float | None = Field(
        0.5, gt=0, description="largest global gradient norm; null: no clipping"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept")


class RolloutRecipe(config.Recipe):
    """What every method on rollouts has: rewards, how completions are sampled, the KL penalty."""

    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    reward: list[RewardEntry] = Field(
        min_length=1, description="what answers are scored by, summed with weights"
    )
    judge: list[RewardEntry] = Field(
        default_factory=list,
        description="scored at evaluations only: a second opinion, to see whether the reward is being fooled",
    )
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection())
    kl: KLPenaltySection = Field(default_factory=lambda: KLPenaltySection())
    train: RolloutTrainSection = Field(default_factory=lambda: RolloutTrainSection())  # type: ignore[assignment]

    @model_validator(mode="after")
    def _possible_rollouts(self) -> RolloutRecipe:
        config.check_prompted(self.data, "prompts")
        config.check_no_answers(self.sample, "prompts")
        config.check_training(self)
        for controller, keys in {"adaptive": ("target", "horizon"), "linear": ("final",)}.items():
            given = [k for k in keys if getattr(self.kl, k) != KLPenaltySection.model_fields[k].default]
            if given and self.kl.controller != controller:
                raise ValueError(
                    f"kl.{given[0]} belongs to kl.controller={controller}, and this one is "
                    f"{self.kl.controller}"
                )
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
