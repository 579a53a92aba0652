"""GRPO and its family: make answers that score better than their alternatives likelier, without a critic.

One step (Shao et al. 2024, "DeepSeekMath", section 4.1):

1. sample several answers to each prompt from the policy's full softmax, and score them;
2. advantage of an answer, the same for all its tokens: its score against its group's mean, divided by the
   group's standard deviation;
3. for each epoch, in a new order, minibatches of the clipped surrogate, and of the KL penalty where there is
   one.

``grpo.preset`` names a member of the family, and each key of ``grpo`` changes one thing in it:

    grpo          the paper's, without its KL penalty unless kl.beta is given
    dr_grpo       no division, every answer's sum by a constant (Liu et al. 2025)
    dapo          a higher upper bound, tokens count alike, equal groups drawn again (Yu et al. 2025)
    gspo          the ratio of whole answers (Zheng et al. 2025)
    rloo          the other answers' mean as baseline, whole answers (Ahmadian et al. 2024)
    reinforce_pp  the step's mean as baseline, scaled by the step's deviation (Hu 2025)

The pure parts are in losses/policy.py (what is differentiated) and rl/ (advantages, aggregation); the step is
rl/learner.py's, as PPO's.

Where we differ: old log-probabilities come from the forward pass that trains, so the first ratio is 1 up to
rounding; the mean is over all tokens, or answers, of an optimizer step, rather than of a micro-batch; a
standard deviation is over n - 1, as in TRL. REINFORCE++'s paper spreads the KL penalty over the tokens and
scales by the deviation of the tokens' advantages: here the penalty is the answer's summed log-ratio, and the
deviation that of the answers' scores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.engines.base import Array, DeviceBatch, Loss, Model
from mlx_posttrain.losses import policy as objective
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.ops import ops
from mlx_posttrain.rl import config as rl_config
from mlx_posttrain.rl.aggregation import LENGTHS, SHARE, Aggregation
from mlx_posttrain.rl.groups import Baseline, Scale, group_experience, shape_scores
from mlx_posttrain.training.method import Algorithm, Method

Ratio = Literal["token", "sequence", "sequence_sum"]
Estimator = Literal["k1", "k2", "k3", "unbiased"]
Place = Literal["loss", "reward"]


@dataclass(frozen=True)
class Settings:
    """What a preset decides; GRPOSection and KLSection describe each."""

    baseline: Baseline = "group"
    scale: Scale = "group"
    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "seq-mean-token-mean"
    resample: int = 0
    place: Place = "loss"
    estimator: Estimator = "k3"


PRESETS: dict[str, Settings] = {
    "grpo": Settings(),
    "dr_grpo": Settings(scale="none", aggregation="seq-mean-token-sum-norm"),
    "dapo": Settings(clip_high=0.28, aggregation="token-mean", resample=4),
    "gspo": Settings(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "rloo": Settings(baseline="leave_one_out", scale="none", ratio="sequence_sum", place="reward"),
    "reinforce_pp": Settings(baseline="global", scale="batch", aggregation="token-mean", place="reward"),
}


def _presets(key: str) -> str:
    """What null means for a key: the value of most presets, and of each that has another."""
    usual = getattr(PRESETS["grpo"], key)
    others = {name: getattr(s, key) for name, s in PRESETS.items() if getattr(s, key) != usual}
    return f"null: {usual}" + "".join(f", {name} {value}" for name, value in others.items())


#: What advantages are divided by where a recipe names another baseline than its preset's, and no scale: a
#: group's own deviation says nothing of its distance from a baseline outside it.
SCALES: dict[Baseline, Scale] = {"global": "batch", "greedy": "none"}


class GRPOSection(config.Section):
    """The objective. A key that is null is what the preset says."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"] = Field(
        "grpo", description="member of the family: its values stand for every key that is null"
    )
    epochs: int = Field(1, ge=1, description="passes of updates over each step's answers")
    baseline: Baseline | None = Field(
        None,
        description="what an answer's score is compared with: its group's mean; that of the others in the "
        "group (RLOO); global, the step's (REINFORCE++); greedy, the greedy answer's score (ReMax); "
        + _presets("baseline"),
    )
    scale: Scale | None = Field(
        None,
        description="what advantages are divided by: the standard deviation of the group or of the step "
        "(batch); " + _presets("scale"),
    )
    std_ddof: int = Field(1, ge=0, le=1, description="1: squares over n - 1, as TRL has it; 0: over n")
    std_eps: float = Field(1e-4, gt=0, description="added to the standard deviation")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="global baseline: share of it that the next step keeps"
    )
    ratio: Ratio | None = Field(
        None,
        description="new to old policy of each token; sequence: the geometric mean of an answer's (GSPO); "
        "sequence_sum: the product; " + _presets("ratio"),
    )
    clip_low: float | None = Field(
        None, gt=0, lt=1, description="how far a ratio may fall below 1; " + _presets("clip_low")
    )
    clip_high: float | None = Field(
        None, gt=0, description="how far it may rise above 1; " + _presets("clip_high")
    )
    delta: float | None = Field(
        None, gt=1, description="upper bound of a ratio whatever its advantage's sign (two-sided clipping)"
    )
    aggregation: Aggregation | None = Field(
        None, description="how tokens are averaged, by verl's names; " + _presets("aggregation")
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh tokens by min(trainer's / sampler's probability, this); null: not at all, since "
        "both are one model here",
    )
    mask_unfinished: bool = Field(
        False, description="do not train on answers that did not end; they stay in their groups"
    )
    overlong_buffer: int | None = Field(
        None, ge=1, description="tokens before rollout.max_tokens over which a score loses up to 1 (DAPO)"
    )
    resample: int | None = Field(
        None,
        ge=0,
        description="times that groups of equal scores make way for other prompts (dynamic sampling); "
        + _presets("resample"),
    )
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy per token, which is maximised")


class KLSection(rl_config.KLPenaltySection):
    """The leash to the reference: the policy as it was before (with an adapter: without it)."""

    beta: float = Field(0.0, ge=0, description="penalty per nat; 0: none, and no reference is kept")
    place: Place | None = Field(None, description="in the loss or in the reward; " + _presets("place"))
    estimator: Estimator | None = Field(
        None, description="of KL in the loss: losses/policy.py has them; " + _presets("estimator")
    )


class RolloutSection(rl_config.RolloutSection):
    """How answers are sampled: from the full softmax, no top-k, no top-p, no repetition penalty."""

    prompts: int = Field(8, ge=1, description="prompts in a step")
    samples: int = Field(8, ge=1, description="answers to each prompt: its group")
    missing_eos_penalty: float | None = Field(
        None, ge=0, description="taken from the score of an answer that did not end by itself; null: none"
    )


class TrainSection(rl_config.RolloutTrainSection):
    """The optimizer and its loop, with GRPO's defaults."""

    steps: int = Field(100, ge=1, description="rollouts, each followed by passes of updates")
    batch_size: int = Field(8, ge=1, description="answers in a micro-batch")
    grad_accumulation: int = Field(8, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="largest global gradient norm; null: no clipping"
    )


class Recipe(rl_config.RolloutRecipe):
    """GRPO against rewards."""

    method: Literal["grpo"] = Field(description="grpo: answer several times, compare, improve")
    grpo: GRPOSection = Field(default_factory=lambda: GRPOSection())
    kl: KLSection = Field(default_factory=lambda: KLSection())
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection())
    train: TrainSection = Field(default_factory=lambda: TrainSection())  # type: ignore[assignment]

    @property
    def settings(self) -> Settings:
        """The preset, changed by the keys that are given."""
        preset = PRESETS[self.grpo.preset]
        given = {f.name: getattr(self.grpo, f.name, None) for f in fields(Settings)}
        given |= {"place": self.kl.place, "estimator": self.kl.estimator}
        if given["scale"] is None and given["baseline"] is not None:
            given["scale"] = SCALES.get(given["baseline"])
        return replace(preset, **{name: value for name, value in given.items() if value is not None})

    @property
    def penalised(self) -> bool:
        """Whether there is a KL penalty, and so a reference."""
        return self.kl.beta > 0 or (self.kl.controller == "linear" and self.kl.final > 0)

    @property
    def updates(self) -> int:
        """Optimizer steps after each rollout."""
        answers = self.rollout.prompts * self.rollout.samples
        return self.grpo.epochs * -(-answers // (self.train.batch_size * self.train.grad_accumulation))

    @property
    def measured(self) -> bool:
        """Whether anything asks for log-probabilities before the update.

        That is a second update, whose ratio is to them, a reference beside them, or a weight against the
        sampler's.
        """
        return self.updates > 1 or self.penalised or self.grpo.importance_cap is not None

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        s, g, fields_of = self.settings, self.grpo, GRPOSection.model_fields
        grouped = s.baseline in ("group", "leave_one_out")
        if self.rollout.samples < 2 and (grouped or s.resample):
            raise ValueError(
                "rollout.samples=1 leaves nothing to compare an answer with: give at least 2, or "
                "grpo.preset=reinforce_pp"
            )
        if s.baseline == "global" and self.rollout.samples * self.rollout.prompts < 2:
            raise ValueError("one answer a step has nothing to be compared with: raise rollout.prompts")
        if s.scale == "group" and not grouped:
            raise ValueError(
                f"grpo.scale=group with grpo.baseline={s.baseline}: a group's deviation says nothing of its "
                "distance from a baseline outside it; use batch or none"
            )
        if s.scale == "none" and any(getattr(g, k) != fields_of[k].default for k in ("std_ddof", "std_eps")):
            raise ValueError("grpo.std_ddof and grpo.std_eps belong to a grpo.scale other than none")
        if g.momentum and s.baseline != "global":
            raise ValueError("grpo.momentum belongs to grpo.baseline=global")
        if g.delta is not None and g.delta <= 1 + s.clip_high:
            raise ValueError(
                f"grpo.delta={g.delta:g} is not above 1 + clip_high = {1 + s.clip_high:g}, which bounds first"
            )
        if not self.penalised and self.kl.controller == "adaptive":
            raise ValueError("kl.controller=adaptive follows kl.beta, which is 0: give its first value")
        if not self.penalised and (self.kl.place or self.kl.estimator):
            raise ValueError("kl.place and kl.estimator belong to a penalty, and kl.beta is 0")
        if s.place == "reward" and self.kl.estimator is not None:
            raise ValueError("kl.estimator belongs to kl.place=loss: in the reward the log-ratio is used")
        if self.penalised and s.place == "reward" and s.scale == "group":
            raise ValueError(
                "kl.place=reward with grpo.scale=group: in a group of equal rewards only the penalty "
                "differs, and dividing would bring it to full size; use grpo.scale=batch or none, or "
                "kl.place=loss"
            )
        buffer = self.grpo.overlong_buffer
        if buffer is not None and buffer > self.rollout.max_tokens:
            raise ValueError(
                f"grpo.overlong_buffer={buffer} is longer than rollout.max_tokens={self.rollout.max_tokens}"
            )
        return self


def policy_loss(recipe: Recipe) -> Loss:
    """The clipped surrogate over a minibatch, with KL penalty and entropy bonus where the recipe has them.

    Metrics, means over tokens, mostly under TRL's names: entropy; clip_ratio/low_mean, high_mean and
    region_mean (tokens without a gradient); kl, where it is in the loss; val/ratio, and policy/approxkl_avg
    of the tokens' own ratios.
    """
    s, temperature, entropy_coef = recipe.settings, recipe.rollout.temperature, recipe.grpo.entropy_coef
    delta, in_loss = recipe.grpo.delta, recipe.penalised and recipe.settings.place == "loss"

    def loss(model: Model, batch: DeviceBatch) -> tuple[Array, dict[str, Array]]:
        mask, extra = batch.mask, batch.extra

        def per_token(values: Array) -> Array:
            return token_mean(values, mask, 1.0, extra[SHARE])

        logprobs, entropy, _ = model.policy_terms(batch, temperature)
        xp = ops(logprobs)
        old = extra["old_logprobs"] if recipe.measured else xp.stop_gradient(logprobs)
        log_ratios = objective.log_ratio(logprobs, old, mask)
        still = xp.stop_gradient(log_ratios)
        if s.ratio != "token":
            lengths = extra[LENGTHS] if s.ratio == "sequence" else None
            rows = batch.tokens.shape[0]
            log_ratios = objective.sequence_log_ratio(log_ratios, batch.row, rows, lengths)
        advantages = extra["advantages"]
        values = objective.clipped_surrogate(log_ratios, advantages, mask, s.clip_low, s.clip_high, delta)
        if "importance" in extra:
            values = values * extra["importance"]
        policy = token_mean(values, mask, batch.total, batch.weight)
        low, high = objective.clipped(log_ratios, advantages, mask, s.clip_low, s.clip_high, delta)
        metrics = {
            "loss/policy_avg": policy,
            "entropy": per_token(entropy),
            "clip_ratio/low_mean": per_token(low),
            "clip_ratio/high_mean": per_token(high),
            "clip_ratio/region_mean": per_token(low + high),
            "policy/approxkl_avg": per_token(0.5 * still**2),
            "val/ratio": per_token(xp.exp(xp.stop_gradient(log_ratios))),
        }
        total = policy
        if not recipe.measured:
            metrics["sampling/sampling_logp_difference/mean"] = per_token(abs(old - extra["old_logprobs"]))
        if in_loss:
            terms = (logprobs, extra["ref_logprobs"], mask, s.estimator, old)
            penalty = objective.kl_estimate(*terms)
            total = total + token_mean(extra["beta"] * penalty, mask, batch.total, batch.weight)
            metrics["kl"] = per_token(penalty)
        if entropy_coef:
            total = total - entropy_coef * token_mean(entropy, mask, batch.total, batch.weight)
        return total, metrics

    return loss


def algorithm(recipe: Recipe) -> Algorithm:
    """GRPO as rl/learner.py runs it."""
    s, section, rollout = recipe.settings, recipe.grpo, recipe.rollout
    shape = partial(
        shape_scores,
        max_tokens=rollout.max_tokens,
        missing_eos_penalty=rollout.missing_eos_penalty,
        missing_eos_score=rollout.missing_eos_score,
        overlong_buffer=section.overlong_buffer,
    )
    note = (
        "a loss near 0 at the first update of a step is expected: the ratio is 1 there, and advantages "
        "average to 0; watch reward and eval/ in metrics.jsonl"
    )
    if recipe.updates == 1:
        note += "\none update a step: its ratio is always 1, so nothing is ever clipped"
    return Algorithm(
        loss=policy_loss(recipe),
        experience=partial(
            group_experience,
            shape=shape,
            baseline=s.baseline,
            scale=s.scale,
            ddof=section.std_ddof,
            eps=section.std_eps,
            momentum=section.momentum,
            kl_in_reward=s.place == "reward",
            mask_unfinished=section.mask_unfinished,
            importance_cap=section.importance_cap,
            measured=recipe.measured,
        ),
        epochs=section.epochs,
        aggregation=s.aggregation,
        resample=s.resample,
        greedy=s.baseline == "greedy",
        shape=shape,
        measured=recipe.measured,
        note=note,
    )


METHOD = Method(
    name="grpo",
    summary="GRPO, Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE++: RL from rewards without a critic",
    Recipe=Recipe,
    algorithm=algorithm,
    reference=lambda recipe: "logprobs" if recipe.penalised else None,
    bench={
        "grpo": {},
        "grpo-twice": {"grpo": {"epochs": 2}},
        "grpo-lora": {"adapter": {"rank": 16, "alpha": 32}},
    },
)
