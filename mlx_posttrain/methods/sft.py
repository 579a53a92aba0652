"""Supervised fine-tuning: imitate the trained tokens. Full weights, LoRA, DoRA, QLoRA; with or without a KL
leash.

    loss = mean over trained tokens of  -log p(token)  +  beta * KL(reference, policy)

The mean runs over all trained tokens of the optimizer step, however it is cut into micro-batches. The KL term
keeps the whole next-token distribution near the frozen starting model at every trained position;
``direction`` names which way round, see :func:`mlx_posttrain.losses.sft.full_kl`. ``beta`` is per token: 0.1
means 0.1, whatever the length of the rows. With an adapter the reference is the same weights with the adapter
off, so the leash costs no second copy of the model. What the reference makes of a row never changes, so its
hidden states are kept where that pays: see reference.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.training import setup


class KLSection(config.Section):
    """A leash to the starting model (with an adapter: to the model without it)."""

    beta: float = Field(0.1, ge=0, description="weight of the KL term, per trained token")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="forward: KL(reference||policy); reverse: KL(policy||reference)"
    )
    cache_gb: float = Field(
        1.0,
        ge=0,
        description="compute the reference's hidden states once and keep them where they fit this many GB "
        "(of GPT-2 350,000 trained tokens in 1); "
        "0: compute them anew each time",
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
    nll = token_mean(-model.logprobs(batch), batch.weight, batch.total)
    return nll, {"nll": nll}


def kl_loss(beta: float, direction: str) -> Loss:
    """The same plus ``beta`` times the mean KL to the reference at the trained positions."""

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        logprobs, divergence = model.logprobs_and_kl(batch, direction, beta)
        nll = token_mean(-logprobs, batch.weight, batch.total)
        kl = token_mean(divergence, batch.weight, batch.total)
        return nll + beta * kl, {"nll": nll, "kl": kl}

    return loss


def run(recipe: Recipe, resume: bool = False) -> dict[str, float]:
    """Run the recipe to the end; returns the figures of the final evaluation. See supervised.run for files
    and errors.
    """
    chosen = loss if recipe.kl is None else kl_loss(recipe.kl.beta, recipe.kl.direction)
    return setup.run(recipe, chosen, adapter=recipe.adapter, resume=resume, **_leash(recipe))


def plan(recipe: Recipe) -> list[plans.Plan]:
    """What the recipe would take; see supervised.planned."""
    return setup.planned(recipe, **_leash(recipe))


def _leash(recipe: Recipe) -> dict[str, Any]:
    return {} if recipe.kl is None else {"reference": True, "cache_gb": recipe.kl.cache_gb}
