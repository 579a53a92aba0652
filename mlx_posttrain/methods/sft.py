"""Supervised fine-tuning: imitate the trained tokens. Full weights, LoRA, DoRA, QLoRA; with or without KL.

    loss = mean over trained tokens of  -log p(token)  +  beta * KL(reference, policy)

The mean runs over all trained tokens of the optimizer step, however it is cut into micro-batches. The KL term
keeps the whole next-token distribution near the frozen starting model at every trained position;
``direction`` names which way round, see :func:`mlx_posttrain.losses.sft.full_kl`. ``beta`` is per token: 0.1
means 0.1, whatever the length of the rows. With an adapter the reference is the same weights with the adapter
off, so the KL term costs no second copy of the model. What the reference makes of a row never changes, so its
hidden states are kept where that pays: see training/reference.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.data.read import row_dataset
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.training.method import Method


class KLSection(config.Section):
    """A penalty for leaving the starting model (with an adapter: the model without it)."""

    beta: float = Field(0.1, ge=0, description="weight of the KL term, per trained token")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(reference||policy); reverse: KL(policy||reference)"
    )
    cache_gb: float = Field(
        1.0,
        ge=0,
        description="compute the reference's hidden states once and keep them where they fit this many GB "
        "(of "
        "GPT-2 350,000 trained tokens in 1); 0: compute them again each time",
    )


class Recipe(config.Recipe):
    """Supervised fine-tuning."""

    method: Literal["sft"] = Field(description="sft: imitate rows")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    kl: KLSection | None = Field(None, description="keep near the starting model; null: plain imitation")

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_training(self)
        return self


def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
    """Mean negative log-likelihood of the trained tokens, in nats."""
    nll = token_mean(-model.logprobs(batch), batch.mask, batch.total, batch.weight)
    return nll, {"nll": nll}


def kl_loss(beta: float, direction: str) -> Loss:
    """The same plus ``beta`` times the mean KL to the reference at the trained positions."""

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        logprobs, divergence = model.logprobs_and_kl(batch, direction, beta)
        nll = token_mean(-logprobs, batch.mask, batch.total, batch.weight)
        kl = token_mean(divergence, batch.mask, batch.total, batch.weight)
        return nll + beta * kl, {"nll": nll, "kl": kl}

    return loss


LORA = {"adapter": {"rank": 16, "alpha": 32}}
KL = {"kl": {"beta": 0.1, "direction": "forward", "cache_gb": 0}}

METHOD = Method(
    name="sft",
    summary="supervised fine-tuning on rows: all weights, LoRA, DoRA or QLoRA, with or without a KL term",
    Recipe=Recipe,
    dataset=row_dataset,
    loss=lambda recipe: loss if recipe.kl is None else kl_loss(recipe.kl.beta, recipe.kl.direction),
    reference=lambda recipe: None if recipe.kl is None else "distribution",
    bench={"sft": {}, "lora": LORA, "kl": KL, "kl-lora": {**KL, **LORA}},
)
