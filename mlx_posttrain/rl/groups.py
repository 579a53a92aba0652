"""Experience without a critic: an answer's advantage is its score against a baseline, for all its tokens.

The baseline comes from other answers: those to the same prompt (GRPO, RLOO), all of the step and of earlier
ones (REINFORCE++), or the greedy one (ReMax). rl/advantages.py has each next to its paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mlx_posttrain.rl import advantages
from mlx_posttrain.rl.experience import Experience, scored
from mlx_posttrain.rl.rollouts import Completion, Stats

Baseline = Literal["group", "leave_one_out", "global", "greedy"]
Scale = Literal["group", "batch", "none"]
#: Scores of a group that differ by less are equal: nothing can be learned from them.
EQUAL = 1e-6


def group_experience(
    completions: Sequence[Completion],
    scores: np.ndarray,
    stats: Stats,
    beta: float,
    value_offset: float = 0.0,
    *,
    max_tokens: int,
    baseline: Baseline = "group",
    scale: Scale = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    momentum: float = 0.0,
    moving: float | None = None,
    greedy: Sequence[tuple[Completion, float]] = (),
    kl_in_reward: bool = False,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    overlong_buffer: int | None = None,
    mask_unfinished: bool = False,
    importance_cap: float | None = None,
) -> Experience:
    """Advantages of scored completions. Pure: models have been asked before.

    scores: [R]; nan for a completion that no reward could score, which is left out. stats: ``old_logprobs``,
    and where there is a KL penalty ``ref_logprobs``. max_tokens: the longest completion allowed.

        advantage = (score - baseline) / (std + eps), std of the group, of the batch, or no division

    moving, momentum: the ``global`` baseline is momentum * moving + (1 - momentum) * the step's mean, and is
    returned as ``Experience.baseline``. greedy: each group's greedy completion with its score, in the order
    of the groups; one without a score is replaced by the group's mean.
    kl_in_reward: beta times the summed log-ratio to the reference is taken from the score; else the loss has
    the penalty. mask_unfinished: completions that did not end are compared with but not trained on.
    importance_cap: the update is weighted by min(pi_old / sampler, cap), which corrects for a sampler whose
    log-probabilities differ from the trainer's (truncated importance sampling, Yao et al. 2025).

    Returns per token ``old_logprobs``, ``advantages``, ``beta``, and ``ref_logprobs`` and ``importance``
    where they are used. Raises UserError when no completion has a score.
    """
    kept = scored(completions, scores)
    completions, raw = [completions[i] for i in kept], scores[kept]
    stats = {name: [values[i] for i in kept] for name, values in stats.items()}
    ended = np.array([c.stopped for c in completions])
    lengths = np.array([len(c.tokens) for c in completions])
    groups = np.array([c.group for c in completions])

    def shaped(values: np.ndarray, of: Sequence[Completion]) -> np.ndarray:
        ended = np.array([c.stopped for c in of])
        if missing_eos_score is not None:
            values = np.where(ended, values, missing_eos_score)
        elif missing_eos_penalty:
            values = np.where(ended, values, values - missing_eos_penalty)
        if overlong_buffer is not None:
            lengths = np.array([len(c.tokens) for c in of])
            values = values + advantages.overlong_penalty(lengths, max_tokens, overlong_buffer)
        return values

    final = shaped(raw.astype(np.float64), completions)
    old = stats["old_logprobs"]
    divergence = np.array([(o - r).sum() for o, r in zip(old, stats.get("ref_logprobs", old), strict=True)])
    if kl_in_reward:
        final = final - beta * divergence

    mean = final.mean()
    if baseline == "global":
        mean = mean if moving is None else momentum * moving + (1 - momentum) * mean
        base = np.full(len(final), mean)
    elif baseline == "leave_one_out":
        base = advantages.leave_one_out(final, groups)
    else:
        base = advantages.group_mean(final, groups)
    if baseline == "greedy":
        compared = shaped(np.array([score for _, score in greedy]), [c for c, _ in greedy])[groups]
        base = np.where(np.isfinite(compared), compared, base)
    advantage = final - base
    spread = advantages.group_std(final, groups, ddof)
    if scale == "group":
        advantage = advantage / (spread + eps)
    elif scale == "batch":
        advantage = advantage / (advantages.group_std(final, np.zeros_like(groups), ddof) + eps)

    difference = [
        np.abs(o - np.asarray(c.logprobs)) for o, c in zip(old, completions, strict=True) if c.logprobs
    ]
    metrics = _metrics(raw, groups, lengths, ended, max_tokens) | {
        "objective/entropy": float(np.mean([-o.sum() for o in old])),
        "unscored": len(scores) - len(kept),
    }
    if "ref_logprobs" in stats:
        metrics["kl"] = float(divergence.mean())
    if difference:
        joined = np.concatenate(difference)
        metrics["sampling/sampling_logp_difference/mean"] = float(joined.mean())
        metrics["sampling/sampling_logp_difference/max"] = float(joined.max())

    trained = [i for i in range(len(completions)) if ended[i] or not mask_unfinished]
    per_token: dict[str, list[np.ndarray]] = {
        "old_logprobs": [old[i] for i in trained],
        "advantages": [np.full(lengths[i], advantage[i]) for i in trained],
    }
    if "ref_logprobs" in stats and not kl_in_reward:
        per_token["ref_logprobs"] = [stats["ref_logprobs"][i] for i in trained]
        per_token["beta"] = [np.full(lengths[i], beta) for i in trained]
    if importance_cap is not None:
        ratios = [np.exp(old[i] - np.asarray(completions[i].logprobs)) for i in trained]
        per_token["importance"] = [np.minimum(r, importance_cap) for r in ratios]
        if ratios:
            joined = np.concatenate(ratios)
            metrics["sampling/importance_sampling_ratio/mean"] = float(joined.mean())
            metrics["sampling/importance_sampling_ratio/max"] = float(joined.max())
    return Experience(
        [completions[i] for i in trained],
        per_token,
        metrics,
        kl=float(divergence.mean()),
        baseline=float(mean) if baseline == "global" else None,
    )


def equal_groups(scores: np.ndarray, groups: np.ndarray) -> set[int]:
    """The groups whose scores are all equal, or of which at most one answer has a score."""
    return {
        int(g)
        for g in np.unique(groups)
        if len(known := scores[(groups == g) & np.isfinite(scores)]) < 2 or np.ptp(known) < EQUAL
    }


def _metrics(
    scores: np.ndarray, groups: np.ndarray, lengths: np.ndarray, ended: np.ndarray, max_tokens: int
) -> dict[str, float]:
    """Metrics of a step's completions under TRL's names."""
    equal = equal_groups(scores, groups)
    found = {
        "reward": scores.mean(),
        "reward_std": advantages.group_std(scores, groups).mean(),
        "frac_reward_zero_std": len(equal) / len(np.unique(groups)),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ended.mean(),
    }
    if equal:
        found["reward_zero_std"] = scores[np.isin(groups, list(equal))].mean()
    if ended.any():
        found["completions/mean_terminated_length"] = lengths[ended].mean()
    return {name: float(value) for name, value in found.items()}


def explain(metrics: Mapping[str, float], prompts: int, samples: int) -> str | None:
    """What a step's metrics say about learning, in a sentence; None when there is nothing to say."""
    equal = round(metrics["frac_reward_zero_std"] * prompts)
    if samples < 2 or equal < 0.9 * prompts:
        return None
    # The groups that still differ say on which side of them the equal ones are.
    other = "harder" if metrics["reward_zero_std"] > metrics["reward"] else "easier"
    return (
        f"all {samples} answers of {equal} of {prompts} prompts earn the same reward: nothing can be learned "
        f"from them; use {other} prompts, more samples or a partial reward"
    )
