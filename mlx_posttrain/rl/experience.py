"""From scored completions to what an update needs: rewards, advantages, returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data import batches as data_batches
from mlx_posttrain.engines.base import Array, DeviceBatch, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.metrics import correlation
from mlx_posttrain.rewards.scorer import Scorer
from mlx_posttrain.rl import advantages, rollouts
from mlx_posttrain.rl.config import RolloutTrainSection
from mlx_posttrain.rl.rollouts import Completion, Stats


@dataclass
class Actors:
    """The models that take part.

    critic: None where nothing predicts returns, or a head on the policy's trunk does. value_offset: added to
    the critic's values, since a head has no bias to begin with the mean of a reward model's scores.
    """

    policy: Model
    critic: Model | None
    tokenizer: Any
    scorer: Scorer
    judge: Scorer
    value_offset: float = 0.0


@dataclass(frozen=True)
class Experience:
    """Scored completions, for each token the arrays that a loss reads from ``batch.extra``, and metrics.

    kl: mean KL to the reference in nats per completion, which an adaptive penalty follows. baseline: what a
    moving baseline has become; None where there is none. sentence: what a person should know of the step.
    """

    completions: list[Completion]
    stats: dict[str, list[np.ndarray]]
    metrics: dict[str, float]
    kl: float = 0.0
    baseline: float | None = None
    sentence: str = ""


#: experience(completions, scores, stats, beta, value_offset) -> Experience; see training/method.py
ExperienceFunction = Callable[..., Experience]


def measure(
    actors: Actors,
    completions: Sequence[Completion],
    temperature: float,
    train: RolloutTrainSection,
    reference: bool = True,
    sampled: bool = False,
) -> dict[str, list[np.ndarray]]:
    """``old_logprobs``, ``ref_logprobs`` and ``old_values`` of every token.

    They come from the forward pass that trains. sampled: the policy still has the weights that sampled, so
    ``old_logprobs`` may be the sampler's: they are where it is exact (Model.exact_sampler) and nothing else
    of the policy's pass is needed.

    Without a critic there are no values; without ``reference`` no ``ref_logprobs``.
    """
    policy, examples = actors.policy, [c.example for c in completions]
    limits = data_batches.evaluation_limits(train.batch_size, train.token_budget)
    parts = data_batches.group_similar([e.tokens for e in examples], policy.shares_prefixes, *limits)
    batches = [data_batches.collate([examples[i] for i in part], policy.context) for part in parts]

    shared = actors.critic is None and policy.has_head
    sampled = sampled and not shared and policy.exact_sampler

    def of_policy(model: Model, batch: DeviceBatch) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        if shared:
            arrays["old_logprobs"], _, arrays["old_values"] = model.policy_terms(batch, temperature)
        elif not sampled:
            arrays["old_logprobs"] = model.logprobs(batch, temperature)
        if reference:
            arrays["ref_logprobs"] = model.reference_logprobs(batch, temperature)
        return arrays

    measured = policy.apply(of_policy, batches) if reference or not sampled else [{} for _ in batches]
    if actors.critic is not None:
        values = actors.critic.apply(lambda model, batch: {"old_values": model.scores(batch)}, batches)
        measured = [{**m, **v} for m, v in zip(measured, values, strict=True)]
    stats: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * len(completions) for name in measured[0]}
    if sampled:
        stats["old_logprobs"] = [np.array(c.logprobs, np.float32) for c in completions]
    for part, batch, arrays in zip(parts, batches, measured, strict=True):
        for name, array in arrays.items():
            for i, row in zip(part, data_batches.by_row(batch, array), strict=True):
                stats[name][i] = row
    return stats


def scored(completions: Sequence[Completion], scores: np.ndarray) -> list[int]:
    """Numbers of the completions that have a score. Raises UserError when none has."""
    kept = [i for i, s in enumerate(scores) if np.isfinite(s)]
    if not kept:
        raise UserError("no answer of this step could be scored: every reward function returned None")
    return kept


def judge_unfinished(
    scores: np.ndarray, completions: Sequence[Completion], penalty: float | None, fixed: float | None
) -> np.ndarray:
    """Scores in which a completion that did not end by itself loses ``penalty``, or has ``fixed``: [R].

    A score that is nan stays so. Huang et al. 2024 (fixed, -1); TRL (penalty).
    """
    ended = np.array([c.stopped for c in completions], bool)
    instead = scores - (penalty or 0.0) if fixed is None else np.where(np.isnan(scores), scores, fixed)
    return np.where(ended, scores, instead)


def experience(
    completions: Sequence[Completion],
    scores: np.ndarray,
    stats: Stats,
    beta: float,
    value_offset: float = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    score_clip: float | None = None,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
) -> Experience:
    """Rewards, advantages by GAE, and returns of scored completions. Pure: models have been asked before.

    scores: [R], normalised; nan for a completion that no reward could score, which is left out. stats:
    ``old_logprobs``, and where they are ``ref_logprobs`` (else there is no KL penalty) and ``old_values``
    (else all values are 0, and there are no returns). A completion that did not end by itself loses
    ``missing_eos_penalty``, or is given ``missing_eos_score`` whatever it says. Raises UserError when no
    completion has a score.

    Returns per token ``old_logprobs``, ``advantages`` (whitened) and with values ``old_values``, ``returns``.
    """
    kept = scored(completions, scores)
    completions, raw = [completions[i] for i in kept], scores[kept]
    ended = [c.stopped for c in completions]
    final = judge_unfinished(raw, completions, missing_eos_penalty, missing_eos_score)
    if score_clip is not None:
        final = np.clip(final, -score_clip, score_clip)
    arrays = {name: rollouts.padded([values[i] for i in kept]) for name, values in stats.items()}
    old, mask = arrays["old_logprobs"]
    reference = arrays["ref_logprobs"][0] if "ref_logprobs" in arrays else old
    critic = "old_values" in arrays
    old_values = arrays["old_values"][0] if critic else np.zeros_like(old)
    values = old_values + value_offset
    rewards = advantages.token_rewards(old, reference, final, mask, beta)
    if whiten_rewards:
        rewards = advantages.whiten(rewards, mask, shift_mean=False)
    advantage, returns = advantages.gae(rewards, values, mask, gamma, lam)
    divergence = ((old - reference) * mask).sum(1)
    penalty = -beta * divergence
    lengths = mask.sum(1)
    metrics = {
        "objective/kl": divergence.mean(),
        "objective/entropy": (-old * mask).sum(1).mean(),
        "objective/scores": raw.mean(),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (final + penalty).mean(),
        "objective/scores_std": raw.std(),
        "val/num_eos_tokens": sum(ended),
        "val/eos_share": np.mean(ended),
        "val/length": lengths.mean(),
        "val/reward_length_correlation": correlation(raw, lengths),
        "val/unscored": len(scores) - len(kept),
    }
    per_token = {"old_logprobs": old, "advantages": advantages.whiten(advantage, mask)}
    if critic:
        metrics["val/explained_variance"] = advantages.explained_variance(values, returns, mask)
        per_token |= {"old_values": old_values, "returns": returns - value_offset}
    return Experience(
        completions,
        {name: rollouts.unpadded(array, mask) for name, array in per_token.items()},
        {name: float(value) for name, value in metrics.items()},
        kl=float(divergence.mean()),
    )
