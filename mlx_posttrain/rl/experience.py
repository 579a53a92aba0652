"""From answers to what an update needs: log-probabilities, values, rewards, advantages, returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data import batches as data_batches
from mlx_posttrain.engines.base import Array, DeviceBatch, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate.metrics import correlation
from mlx_posttrain.rewards import scorer as scoring
from mlx_posttrain.rl import advantages, rollouts
from mlx_posttrain.rl.rollouts import Answer
from mlx_posttrain.rl.settings import PPOSection, PPOTrainSection


@dataclass
class Parties:
    """The models that take part: ``critic`` is None when it is a head on the policy's trunk.

    ``value_offset`` is added to what the critic says: a head has no bias to begin with the mean of a reward
    model's scores.
    """

    policy: Model
    critic: Model | None
    tokenizer: Any
    scorer: scoring.Scorer
    judge: scoring.Scorer
    value_offset: float = 0.0


@dataclass(frozen=True)
class Experience:
    """Scored answers, and for each answer token: old log-probability, old value, advantage, return."""

    answers: list[Answer]
    figures: dict[str, list[np.ndarray]]
    statistics: dict[str, float]


def measure(
    parties: Parties,
    answers: Sequence[Answer],
    temperature: float,
    train: PPOTrainSection,
    context: int | None,
) -> dict[str, list[np.ndarray]]:
    """``old`` and ``reference`` log-probabilities and ``old_value`` of every answer token, from the forward
    pass that trains.
    """
    examples = [a.example for a in answers]
    limits = data_batches.evaluation_limits(train.batch_size, train.token_budget)
    rows = data_batches.alike([e.tokens for e in examples], parties.policy.packs, *limits)
    batches = [data_batches.collate([examples[i] for i in part], context) for part in rows]

    def of_policy(model: Model, batch: DeviceBatch) -> dict[str, Array]:
        old, _, values = model.policy_terms(batch, temperature)
        found = {"old": old, "reference": model.reference_logprobs(batch, temperature)}
        return found if values is None else {**found, "old_value": values}

    found = parties.policy.apply(of_policy, batches)
    if parties.critic is not None:
        values = parties.critic.apply(lambda model, batch: {"old_value": model.scores(batch)}, batches)
        found = [{**f, **v} for f, v in zip(found, values, strict=True)]
    figures: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * len(answers) for name in found[0]}
    for part, batch, arrays in zip(rows, batches, found, strict=True):
        for name, array in arrays.items():
            for i, row in zip(part, data_batches.by_row(batch, array), strict=True):
                figures[name][i] = row
    return figures


def experience(
    answers: Sequence[Answer],
    scores: np.ndarray,
    figures: Mapping[str, list[np.ndarray]],
    settings: PPOSection,
    missing_eos_penalty: float | None,
    beta: float,
    value_offset: float = 0.0,
    missing_eos_score: float | None = None,
) -> Experience:
    """Rewards, advantages and returns of scored answers. Pure: models have been asked before.

    scores: [R], normalised; nan for an answer that no reward could score, which is left out. An answer that
    did not end by itself loses ``missing_eos_penalty``, or is given ``missing_eos_score`` whatever it says.
    Raises UserError when no answer has a score.
    """
    kept = [i for i, s in enumerate(scores) if np.isfinite(s)]
    if not kept:
        raise UserError("no answer of this step could be scored: every reward function returned None")
    answers = [answers[i] for i in kept]
    raw = scores[kept]
    final = np.where(
        [a.stopped for a in answers],
        raw,
        raw - (missing_eos_penalty or 0.0) if missing_eos_score is None else missing_eos_score,
    )
    if settings.score_clip is not None:
        final = np.clip(final, -settings.score_clip, settings.score_clip)
    arrays = {name: rollouts.padded([values[i] for i in kept]) for name, values in figures.items()}
    mask = arrays["old"][1]
    old, reference, said = (arrays[name][0] for name in ("old", "reference", "old_value"))
    values = said + value_offset
    rewards = advantages.token_rewards(old, reference, final, mask, beta)
    if settings.whiten_rewards:
        rewards = advantages.whiten(rewards, mask, shift_mean=False)
    advantage, returns = advantages.gae(rewards, values, mask, settings.gamma, settings.lam)
    whitened = advantages.whiten(advantage, mask)
    divergence = ((old - reference) * mask).sum(1)
    penalty = -beta * divergence
    lengths = mask.sum(1)
    statistics = {
        "objective/kl": divergence.mean(),
        "objective/entropy": (-old * mask).sum(1).mean(),
        "objective/scores": raw.mean(),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (final + penalty).mean(),
        "objective/scores_std": raw.std(),
        "val/explained_variance": advantages.explained_variance(values, returns, mask),
        "val/num_eos_tokens": sum(a.stopped for a in answers),
        "val/eos_share": np.mean([a.stopped for a in answers]),
        "val/length": lengths.mean(),
        "val/reward_length_correlation": correlation(raw, lengths),
        "val/unscored": len(scores) - len(kept),
    }
    per_token = {"old": old, "old_value": said, "advantage": whitened, "return": returns - value_offset}
    return Experience(
        list(answers),
        {n: rollouts.unpadded(v, mask) for n, v in per_token.items()},
        {n: float(v) for n, v in statistics.items()},
    )
