"""Reward model: learn from pairs which of two answers people (or checkers) prefer.

    loss = mean over pairs of  -log sigma(r(chosen) - r(rejected) - margin)
                               + centering * (r(chosen) + r(rejected))^2

r is a scalar head on the backbone's hidden state at the row's last token (data/pairs.py, ``last_token``; the
rule of transformers' sequence classifiers, so that an exported model gives the same scores there). All pairs
of one prompt are in one batch, each answer read once (Ouyang et al. 2022, section 3.5): spread over an epoch
they would be trained on several times. The head starts from N(0, 1 / (width + 1)) (Stiennon et al. 2020), new
adapters as everywhere. ``final/`` is a sequence classifier with one label, or a PEFT adapter of one;
``report.json`` says what the model learned beyond what the length or the words of an answer give away.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mlx_posttrain import config, runs
from mlx_posttrain.console import log
from mlx_posttrain.data.read import pair_dataset, scored_pair_collator
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.evaluation import preference
from mlx_posttrain.losses.preference import bradley_terry, centering
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.ops import ops
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.training.method import Method
from mlx_posttrain.training.session import Session


class RewardSection(config.Section):
    """The pairwise loss."""

    centering: float = Field(
        0.0,
        ge=0,
        description="weight of (r_chosen + r_rejected)^2, which keeps scores around 0; 0.01 is usual",
    )


class Recipe(config.Recipe):
    """A reward model from preference pairs."""

    method: Literal["reward"] = Field(description="reward: score answers, trained on pairs")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter and the head instead of all weights; null: all weights"
    )
    reward: RewardSection = Field(default_factory=lambda: RewardSection())

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_prompted(self.data, "pairs")
        config.check_no_answers(self.sample, "pairs")
        config.check_training(self)
        return self


def pair_loss(weight: float = 0.0) -> Loss:
    """Mean Bradley-Terry loss over pairs, plus ``weight`` times the centering term.

    Metrics: nll, accuracy (a tie counts half), margin (of the scores).
    """

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        scores = model.scores(batch)
        chosen, rejected = scores[batch.extra["chosen"]], scores[batch.extra["rejected"]]
        xp = ops(scores)

        def mean(values: Array) -> Array:
            return token_mean(values, batch.extra["pair_weight"], batch.total)

        nll = mean(bradley_terry(chosen, rejected, batch.extra["margin"]))
        right = xp.astype(chosen > rejected, chosen) + 0.5 * xp.astype(chosen == rejected, chosen)
        metrics = {"nll": nll, "accuracy": mean(right), "margin": mean(chosen - rejected)}
        if not weight:
            return nll, metrics
        return nll + weight * mean(centering(chosen, rejected)), metrics

    return loss


def report(session: Session) -> dict[str, Any]:
    """Score held-out pairs, compare with what length and words alone would say, and write report.json."""
    losses = [r["nll"] for r in session.run.metrics() if "nll" in r]
    metrics: dict[str, Any] = {"mean_training_loss": float(np.mean(losses)) if losses else float("nan")}
    pairs = session.dataset.held_out if session.dataset else []
    if not pairs:
        return metrics
    assert session.dataset is not None
    rows = [side.tokens for pair in pairs for side in (pair.chosen, pair.rejected)]
    scores = score_rows(session.model, rows, session.facts.pad)
    held_out = [pair.row for pair in pairs]
    seed = session.recipe.seed
    judged = preference.compare_with_baselines(
        scores[::2], scores[1::2], held_out, session.dataset.train_rows, seed
    )
    text = json.dumps(judged.to_dict() | metrics, indent=2) + "\n"
    runs.write_text(session.run.folder / "report.json", text)
    log(
        f"mean training loss {metrics['mean_training_loss']:.4f} (a coin has ln 2 = 0.6931)\n"
        + "\n".join(judged.lines())
    )
    return metrics | {"accuracy": judged.accuracy.mean}


METHOD = Method(
    name="reward",
    summary="a reward model from preference pairs",
    Recipe=Recipe,
    dataset=pair_dataset,
    collator=scored_pair_collator,
    loss=lambda recipe: pair_loss(recipe.reward.centering),
    saves=lambda recipe: "classifier",
    report=report,
    bench={"reward": {}},
)
