"""KTO: a policy from single answers that are labelled good or bad, without pairs and without a reward model.

    loss = mean over answers of  w_y (1 - sigma(+-beta (r - z))),   r = log pi(y|x) - log pi_ref(y|x),
    z = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)),            + for a good answer, - for a bad one

(Ethayarajh et al. 2024, eq. 7 and 8). y' is the answer to another prompt; z estimates the policy's KL to its
reference, and no gradient flows through it. Which y' goes with x is
fixed by seed for the whole run, so that the reference's log-probabilities of y and y' are computed once,
before the first step, and kept in the run.

Where we differ: z is a mean over the micro-batch, as in TRL, while the paper's is over the whole batch. So
accumulating micro-batches gives the gradient of one large batch up to the spread of z; a z of the whole step
would need a forward pass over all its micro-batches before the first backward one. The paper, and TRL, take
the y' of a batch from the same batch; here they come from all rows, and never from one with the same prompt.
Sums over an answer include its end-of-text token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.data.dataset import Collator, Dataset
from mlx_posttrain.data.labelled import MISMATCHED, labelled_collator, labelled_dataset
from mlx_posttrain.data.read import ModelFacts
from mlx_posttrain.data.types import Judged
from mlx_posttrain.engines.base import REFERENCE_LOGPROBS, Array, DeviceBatch, Loss, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import labelled_reward
from mlx_posttrain.losses.preference import kto, kto_baseline
from mlx_posttrain.losses.sft import sequence_logprobs, token_mean
from mlx_posttrain.ops import ops
from mlx_posttrain.training.method import Method

#: Bounds of good to bad answers, each number times its weight (Ethayarajh et al. 2024, section 4.1).
RATIOS = (1.0, 4 / 3)


class KTOSection(config.Section):
    """The loss of single answers."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference")
    desirable_weight: float | None = Field(
        None,
        gt=0,
        description="weight of a good answer; null: from the numbers of good and bad answers, see "
        "docs/preference.md",
    )
    undesirable_weight: float | None = Field(None, gt=0, description="weight of a bad answer; null: the same")


class Recipe(config.Recipe):
    """A policy from labelled answers."""

    method: Literal["kto"] = Field(description="kto: from single answers labelled good or bad")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    kto: KTOSection = Field(default_factory=lambda: KTOSection())
    reference: str | None = Field(
        None, description="model whose log-probabilities the policy is held to; null: the starting model"
    )

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_prompted(self.data, "labelled answers")
        config.check_training(self)
        if self.train.batch_size < 2:
            raise ValueError(
                "train.batch_size=1: KTO compares each answer with the micro-batch's mean drift from the "
                "reference, which of one answer says nothing; give at least 2"
            )
        return self


def kto_loss(section: KTOSection) -> Loss:
    """The weighted mean of KTO's loss over labelled answers.

    Metrics: kl, the loss's z in nats an answer; and sums that :func:`by_label` makes means of: the shares of
    good and of bad answers, and rewards (beta times log-ratio) and log-probs of either.
    """

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        label, weight = batch.extra["label"], batch.extra["row_weight"]
        other = mismatched(batch)
        xp = ops(batch.mask)
        baseline = kto_baseline(answer_sums(xp.stop_gradient(drift(model, other)[1]), other))
        logprobs, ratios = drift(model, batch)
        logps, ratio = answer_sums(logprobs, batch), answer_sums(ratios, batch)
        every = xp.ones_like(label)

        def mean(values: Array, weight: Array | None = None) -> Array:
            return token_mean(values, every, batch.total, weight)

        reward = section.beta * ratio
        return mean(kto(ratio, label, baseline, section.beta), weight), {
            "kl": mean(baseline * every),
            "share/chosen": mean(label),
            "share/rejected": mean(1 - label),
            "rewards/chosen": mean(reward, label),
            "rewards/rejected": mean(reward, 1 - label),
            "logps/chosen": mean(logps, label),
            "logps/rejected": mean(logps, 1 - label),
        }

    return loss


def mismatched(batch: DeviceBatch) -> DeviceBatch:
    """The mismatched answers that a batch carries, as a batch."""
    own = {
        name.removeprefix(MISMATCHED): values
        for name, values in batch.extra.items()
        if name.startswith(MISMATCHED)
    }
    fields = {name: own.pop(name) for name in DeviceBatch.FIELDS}
    return DeviceBatch(**fields, total=batch.total, extra=own)


def drift(model: Model, batch: DeviceBatch) -> tuple[Array, Array]:
    """[N] log-probs of a batch's tokens, and their differences from the reference's."""
    logprobs = model.logprobs(batch)
    return logprobs, logprobs - batch.extra[REFERENCE_LOGPROBS]


def answer_sums(values: Array, batch: DeviceBatch) -> Array:
    """[R] sums of [N] values over each row's answer."""
    return sequence_logprobs(values, batch.mask, batch.row, batch.tokens.shape[0])


def by_label(sums: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics as TRL names them: means over the good answers, ``chosen``, and the bad, ``rejected``.

    sums: metrics of :func:`kto_loss` over the step. What would be a mean over no answer is left out.
    """
    found = dict(sums)
    for kind in ("chosen", "rejected"):
        share = found.pop(f"share/{kind}")
        for name in (f"rewards/{kind}", f"logps/{kind}"):
            total = found.pop(name)
            if share > 0:
                found[name] = total / share
    if {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def class_weights(good: int, bad: int, section: KTOSection) -> tuple[float, float]:
    """Weights of good and bad answers: the section's, where null as near to 1 as RATIOS allow.

    With both null the weight of the rarer kind is raised. good, bad: how many there are, at least 1 each.
    """
    low, high = RATIOS
    desirable, undesirable = section.desirable_weight, section.undesirable_weight
    if desirable is None and undesirable is None:
        desirable, undesirable = (None, 1.0) if good < bad else (1.0, None)
    if desirable is None:
        assert undesirable is not None
        balance = undesirable * bad / good
        return min(max(1.0, low * balance), high * balance), undesirable
    if undesirable is None:
        balance = desirable * good / bad
        return desirable, min(max(1.0, balance / high), balance / low)
    return desirable, undesirable


def dataset(recipe: Any, facts: ModelFacts, collate: Collator) -> Dataset:
    """The recipe's labelled answers with their weights, which are printed.

    Raises UserError where all training answers have one label.
    """
    data = labelled_dataset(recipe, facts, collate)
    items: Sequence[Judged] = data.train
    good = sum(item.good for item in items)
    bad = len(items) - good
    if not good or not bad:
        kind, other = ("good", "bad") if good else ("bad", "good")
        raise UserError(
            f"{recipe.data.origin}: all {len(items):,} answers to train on are labelled {kind}, and KTO "
            f"learns from both kinds: add {other} ones"
            + (", or imitate these with method: sft" if good else "; or look at which labels mean what")
        )
    desirable, undesirable = class_weights(good, bad, recipe.kto)
    ratio = desirable * good / (undesirable * bad)
    within = RATIOS[0] * 0.999 <= ratio <= RATIOS[1] * 1.001
    log(
        f"kto: {good:,} good and {bad:,} bad answers; desirable_weight {desirable:.4g}, undesirable_weight "
        f"{undesirable:.4g}: good to bad {ratio:.3g} to 1"
        + ("" if within else ", and the paper advises 1 to 1.33; null weighs so")
    )
    single = sum(
        len({items[i].good for part in data.rows(step) for i in part}) == 1
        for step in range(min(data.steps, data.steps_per_epoch))
    )
    if single:
        log(
            f"kto: {single:,} of {min(data.steps, data.steps_per_epoch):,} steps have answers of one label "
            "only, and report no rewards/margins; a larger batch has both"
        )
    weights = {True: desirable, False: undesirable}
    data.train, data.held_out = (
        [replace(item, weight=weights[item.good]) for item in part] for part in (data.train, data.held_out)
    )
    return data


METHOD = Method(
    name="kto",
    summary="KTO: from single answers labelled good or bad, or from pairs taken apart",
    Recipe=Recipe,
    dataset=dataset,
    collator=labelled_collator,
    loss=lambda recipe: kto_loss(recipe.kto),
    metrics=by_label,
    reference=lambda recipe: "logprobs",
    report=labelled_reward.report,
    bench={"kto": {}, "kto-lora": {"adapter": {"rank": 16, "alpha": 32}}},
)
