"""Preference optimisation on pairs: DPO, IPO, SimPO, ORPO and their relatives, without a reward model.

    DPO:   loss = mean over pairs of  -log sigma(beta h),
           h = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]

``preference.loss`` names the loss; each is one function in losses/preference.py, next to its paper. The
reference is the model that the run starts from, as it is then, or the one that ``reference`` names. Only its
log-probability of each answer is needed: computed once, before the first step, and kept in the run, so that
there is no second model in memory. The losses without a reference (SimPO, ORPO, CPO) skip that.

Where we differ: sums over an answer include its end-of-text token, as training on rows does. The imitation
term of ORPO, CPO and RPO is the mean of each chosen answer's tokens, then over pairs (Hong et al. 2024, eq.
2; Pang et al. 2024, eq. 1), where TRL takes one mean over all tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.data.dataset import Collator, Dataset
from mlx_posttrain.data.pairs import PairCollator
from mlx_posttrain.data.ranked import score_gap
from mlx_posttrain.data.read import ModelFacts, pair_dataset
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import implicit_reward
from mlx_posttrain.losses import preference as losses
from mlx_posttrain.losses.sft import sequence_logprobs, token_mean
from mlx_posttrain.ops import ops
from mlx_posttrain.training.method import Method


class Sides(NamedTuple):
    """What a loss compares: [P] log-ratios of the answers, log-probs without a reference, and [P] margins."""

    chosen: Array
    rejected: Array
    margin: Array


@dataclass(frozen=True)
class Objective:
    """A loss that ``preference.loss`` can name.

    value: of the sides and the recipe's section. reference: whether sides are log-ratios. length: whether
    they are means over an answer's tokens whatever ``normalise`` says. beta, imitation: what null stands for.
    takes: the optional keys that it reads.
    """

    value: Callable[[Sides, PreferenceSection], Array]
    reference: bool = True
    length: bool = False
    beta: float = 0.1
    imitation: float = 0.0
    takes: tuple[str, ...] = ()


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(
        lambda s, p: losses.dpo(s.chosen, s.rejected, p.strength, p.label_smoothing, s.margin),
        takes=("label_smoothing", "margin"),
    ),
    "robust": Objective(
        lambda s, p: losses.robust(s.chosen, s.rejected, p.strength, p.label_smoothing),
        takes=("label_smoothing",),
    ),
    "ipo": Objective(lambda s, p: losses.ipo(s.chosen, s.rejected, p.strength)),
    "hinge": Objective(
        lambda s, p: losses.hinge(s.chosen, s.rejected, p.strength, s.margin), takes=("margin",)
    ),
    "apo_zero": Objective(lambda s, p: losses.apo_zero(s.chosen, s.rejected, p.strength)),
    "apo_down": Objective(lambda s, p: losses.apo_down(s.chosen, s.rejected, p.strength)),
    "exo_pair": Objective(
        lambda s, p: losses.exo_pair(s.chosen, s.rejected, p.strength, p.label_smoothing or 1e-3),
        takes=("label_smoothing",),
    ),
    "nca_pair": Objective(lambda s, p: losses.nca_pair(s.chosen, s.rejected, p.strength)),
    "sppo_hard": Objective(lambda s, p: losses.sppo_hard(s.chosen, s.rejected, p.strength)),
    "discopop": Objective(lambda s, p: losses.discopop(s.chosen, s.rejected, p.strength)),
    "simpo": Objective(
        lambda s, p: losses.simpo(s.chosen, s.rejected, p.strength, p.gamma),
        reference=False,
        length=True,
        beta=2.0,
        takes=("gamma",),
    ),
    "orpo": Objective(
        lambda s, p: p.strength * losses.odds_ratio(s.chosen, s.rejected),
        reference=False,
        length=True,
        imitation=1.0,
    ),
    "cpo": Objective(
        lambda s, p: losses.cpo(s.chosen, s.rejected, p.strength, p.label_smoothing),
        reference=False,
        imitation=1.0,
        takes=("label_smoothing",),
    ),
}


class PreferenceSection(config.Section):
    """The pairwise loss."""

    loss: Literal[
        "dpo",
        "ipo",
        "simpo",
        "orpo",
        "cpo",
        "hinge",
        "robust",
        "apo_zero",
        "apo_down",
        "exo_pair",
        "nca_pair",
        "sppo_hard",
        "discopop",
    ] = Field("dpo", description="the loss: losses/preference.py has each next to its paper")
    beta: float | None = Field(
        None,
        gt=0,
        description="strength of the pull to the reference, of ORPO the weight of its odds-ratio term; null: "
        "0.1, and 2 for simpo",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of the pairs taken to be labelled the wrong way round: dpo (then conservative "
        "DPO), robust, exo_pair, cpo",
    )
    gamma: float = Field(0.5, description="simpo: by how much the chosen answer's mean must be better")
    normalise: Literal["none", "length"] = Field(
        "none",
        description="length: divide an answer's sum by its number of tokens, as TRL does for ipo; simpo and "
        "orpo always do",
    )
    margin: bool = Field(
        False,
        description="subtract the rows' column margin, or their difference in score, inside the "
        "loss: dpo (ODPO) and hinge",
    )
    sft_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the chosen answer's negative log-likelihood, a mean over its tokens (RPO); "
        "null: "
        "1 for orpo and cpo, else 0",
    )
    ld_alpha: float = Field(
        1.0,
        ge=0,
        le=1,
        description="weight of the tokens by which one answer is longer than the other (LD-DPO); 1: as "
        "the others",
    )

    @property
    def objective(self) -> Objective:
        """The loss's entry in OBJECTIVES."""
        return OBJECTIVES[self.loss]

    @property
    def strength(self) -> float:
        """``beta``, or the loss's own where it is null."""
        return self.objective.beta if self.beta is None else self.beta

    @property
    def imitation(self) -> float:
        """``sft_weight``, or the loss's own where it is null."""
        return self.objective.imitation if self.sft_weight is None else self.sft_weight

    @property
    def by_length(self) -> bool:
        """Whether an answer's sum is divided by its number of tokens."""
        return self.objective.length or self.normalise == "length"

    @model_validator(mode="after")
    def _possible(self) -> PreferenceSection:
        defaults = {"label_smoothing": 0.0, "margin": False, "gamma": 0.5}
        for key, default in defaults.items():
            if getattr(self, key) != default and key not in self.objective.takes:
                readers = [name for name, one in OBJECTIVES.items() if key in one.takes]
                raise ValueError(f"{key} is not part of {self.loss}; it belongs to {', '.join(readers)}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "robust without label_smoothing is dpo: give the share of wrong labels, or loss=dpo"
            )
        return self


class Recipe(config.Recipe):
    """A policy from preference pairs."""

    method: Literal["preference"] = Field(
        description="preference: DPO and its relatives, from pairs of answers"
    )
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    preference: PreferenceSection = Field(default_factory=lambda: PreferenceSection())
    reference: str | None = Field(
        None, description="model whose log-probabilities the policy is held to; null: the starting model"
    )

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_prompted(self.data, "pairs")
        config.check_training(self)
        if self.reference is not None and not self.preference.objective.reference:
            raise ValueError(f"preference.loss={self.preference.loss} has no reference: leave out reference")
        return self


def pair_loss(section: PreferenceSection) -> Loss:
    """The mean of the section's loss over pairs, with its imitation term.

    Metrics, under TRL's names: rewards/chosen and rewards/rejected (beta times log-ratio of the whole answer,
    also where the loss divides it by the length; without a reference beta times log-prob), rewards/margins,
    rewards/accuracies (a tie counts half), logps/chosen and logps/rejected (nats an answer); with an
    imitation term nll, in nats a token.
    """
    objective, imitation = section.objective, section.imitation

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        extra, rows = batch.extra, batch.tokens.shape[0]
        chosen, rejected = extra["chosen"], extra["rejected"]

        def per_row(values: Array) -> Array:
            return sequence_logprobs(values, batch.mask, batch.row, rows, batch.weight)

        def mean(values: Array) -> Array:
            return token_mean(values, extra["pair_weight"], batch.total)

        logprobs = model.logprobs(batch)
        xp = ops(logprobs)
        logps, tokens = per_row(logprobs), xp.maximum(per_row(xp.ones_like(logprobs)), 1.0)
        side = logps - per_row(extra["ref_logprobs"]) if objective.reference else logps
        reward = section.strength * (side / tokens if objective.length else side)
        if section.by_length:
            side = side / tokens
        margin = extra["margin"] if section.margin else 0.0 * extra["margin"]
        value = mean(objective.value(Sides(side[chosen], side[rejected], margin), section))
        gap = reward[chosen] - reward[rejected]
        right = xp.astype(gap > 0, gap) + 0.5 * xp.astype(gap == 0, gap)
        metrics = {
            "rewards/chosen": mean(reward[chosen]),
            "rewards/rejected": mean(reward[rejected]),
            "rewards/margins": mean(gap),
            "rewards/accuracies": mean(right),
            "logps/chosen": mean(logps[chosen]),
            "logps/rejected": mean(logps[rejected]),
        }
        if imitation:
            nll = mean(-(logps / tokens)[chosen])
            return value + imitation * nll, {**metrics, "nll": nll}
        return value, metrics

    return loss


def collator(recipe: Any, facts: ModelFacts) -> Collator:
    """Pairs whose answers' tokens are positions, weighted as ``preference.ld_alpha`` says."""
    return PairCollator(facts.pad, facts.context, score=False, beyond=recipe.preference.ld_alpha)


def dataset(recipe: Any, facts: ModelFacts, collate: Collator) -> Dataset:
    """The recipe's pairs; their margins are the column ``margin``, or else differences in score.

    Raises UserError for ``preference.margin`` where no row has either.
    """
    pairs = pair_dataset(recipe, facts, collate)
    if recipe.preference.margin and not any(pair.margin for pair in pairs.train):
        pairs.train, pairs.held_out = (
            [replace(pair, margin=score_gap(pair.row.extra)) for pair in part]
            for part in (pairs.train, pairs.held_out)
        )
        if not any(pair.margin for pair in pairs.train):
            raise UserError(
                f"{recipe.data.origin}: preference.margin=true, and no row has a column 'margin' other than "
                "0, nor scores; name it with data.columns, for example {margin: score_gap}, or leave "
                "preference.margin out"
            )
        log("margins: the difference in score of each pair's answers")
    return pairs


METHOD = Method(
    name="preference",
    summary="preference optimisation from pairs: DPO, IPO, SimPO, ORPO, CPO and relatives",
    Recipe=Recipe,
    dataset=dataset,
    collator=collator,
    loss=lambda recipe: pair_loss(recipe.preference),
    reference=lambda recipe: "logprobs" if recipe.preference.objective.reference else None,
    report=implicit_reward.report,
    bench={"dpo": {}, "dpo-lora": {"adapter": {"rank": 16, "alpha": 32}}},
)
