"""Experience without a critic: an answer's advantage is its score against a baseline, for all its tokens.

The baseline comes from other answers: those to the same prompt (GRPO, RLOO), all of the step and of earlier
ones (REINFORCE++), or the greedy one (ReMax). rl/advantages.py has each next to its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mlx_posttrain.rl import advantages
from mlx_posttrain.rl.experience import Experience, judge_unfinished, scored
from mlx_posttrain.rl.rollouts import Completion, Stats

Baseline = Literal["group", "leave_one_out", "global", "greedy"]
Scale = Literal["group", "batch", "none"]
#: What turns scores into those that are compared: penalties for length and for answers that did not end.
Shape = Callable[[np.ndarray, Sequence[Completion]], np.ndarray]
#: Scores that differ by less are equal: nothing can be learned from them.
EQUAL = 1e-6
MANY = 0.9  # the share of groups of equal scores from which on a run says so


def shape_scores(
    scores: np.ndarray,
    completions: Sequence[Completion],
    *,
    max_tokens: int,
    missing_eos_penalty: float | None = None,
    missing_eos_score: float | None = None,
    overlong_buffer: int | None = None,
) -> np.ndarray:
    """The scores that are compared: [R], nan where there is none.

    First :func:`~mlx_posttrain.rl.experience.judge_unfinished`; then a completion that reaches into the last
    ``overlong_buffer`` tokens before ``max_tokens`` loses up to 1 (:func:`advantages.overlong_penalty`).
    """
    final = judge_unfinished(scores, completions, missing_eos_penalty, missing_eos_score)
    if overlong_buffer is not None:
        lengths = np.array([len(c.tokens) for c in completions])
        final = final + advantages.overlong_penalty(lengths, max_tokens, overlong_buffer)
    return final


def group_experience(
    completions: Sequence[Completion],
    scores: np.ndarray,
    stats: Stats,
    beta: float,
    value_offset: float = 0.0,
    *,
    shape: Shape = lambda scores, completions: scores,
    baseline: Baseline = "group",
    scale: Scale = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    momentum: float = 0.0,
    moving: float | None = None,
    greedy: Sequence[tuple[Completion, float]] = (),
    kl_in_reward: bool = False,
    mask_unfinished: bool = False,
    importance_cap: float | None = None,
    measured: bool = True,
) -> Experience:
    """Advantages of scored completions. Pure: models have been asked before.

    scores: [R]; nan for a completion that no reward could score, which is left out. stats: ``old_logprobs``,
    and where there is a KL penalty ``ref_logprobs``.

        advantage = (score - baseline) / (std + eps), std of the group, of the batch, or no division

    moving, momentum: the ``global`` baseline is momentum * moving + (1 - momentum) * the step's mean, and is
    returned as ``Experience.baseline``. greedy: each group's greedy completion with its score, in the order
    of the groups; one without a score is replaced by the group's mean. kl_in_reward: beta times the summed
    log-ratio to the reference is taken from the score; else the loss has the penalty. mask_unfinished:
    completions that did not end are compared with but not trained on. importance_cap: the update is weighted
    by min(pi_old / sampler, cap), which corrects for a sampler whose log-probabilities differ from the
    trainer's (truncated importance sampling, Yao et al. 2025). measured: whether ``old_logprobs`` are the
    trainer's, and say how far the sampler's are from them.

    Returns per token ``old_logprobs``, ``advantages``, and ``ref_logprobs``, ``beta`` and ``importance``
    where they are used. Raises UserError when no completion has a score.
    """
    kept = scored(completions, scores)
    completions, raw = [completions[i] for i in kept], scores[kept]
    stats = {name: [values[i] for i in kept] for name, values in stats.items()}
    groups = np.array([c.group for c in completions])
    old = stats["old_logprobs"]
    divergence = np.array([(o - r).sum() for o, r in zip(old, stats.get("ref_logprobs", old), strict=True)])
    compared = shape(raw, completions)
    final = compared - beta * divergence if kl_in_reward else compared

    base, mean = advantages.group_mean(final, groups), None
    if baseline == "global":
        mean = float(final.mean())
        mean = mean if moving is None else momentum * moving + (1 - momentum) * mean
        base = np.full(len(final), mean)
    elif baseline == "leave_one_out":
        base = advantages.leave_one_out(final, groups)
    elif baseline == "greedy":
        of_greedy = shape(np.array([score for _, score in greedy]), [c for c, _ in greedy])[groups]
        base = np.where(np.isfinite(of_greedy), of_greedy, base)
    advantage = final - base
    if scale != "none":
        over = groups if scale == "group" else np.zeros_like(groups)
        spread = advantages.group_std(final, over, ddof)
        # Equal scores have no scale: those of a batch may still differ from a moving baseline.
        advantage = advantage / np.where(spread > EQUAL, spread + eps, 1.0)

    trained = [i for i, c in enumerate(completions) if c.stopped or not mask_unfinished]
    per_token: dict[str, list[np.ndarray]] = {
        "old_logprobs": [old[i] for i in trained],
        "advantages": [np.full(len(old[i]), advantage[i]) for i in trained],
    }
    if "ref_logprobs" in stats and not kl_in_reward:
        per_token["ref_logprobs"] = [stats["ref_logprobs"][i] for i in trained]
        per_token["beta"] = [np.full(len(old[i]), beta) for i in trained]
    sampled = [np.asarray(c.logprobs if c.logprobs else o) for c, o in zip(completions, old, strict=True)]
    if importance_cap is not None:
        per_token["importance"] = [np.minimum(np.exp(old[i] - sampled[i]), importance_cap) for i in trained]

    metrics = _metrics(raw, compared, groups, completions)
    metrics["objective/entropy"] = float(np.mean([-row.sum() for row in old]))
    if measured:
        metrics |= _sampler_metrics(old, sampled)
    metrics["unscored"] = len(scores) - len(kept)
    metrics["objective/rlhf_reward"] = float(final.mean())
    if "ref_logprobs" in stats:
        metrics["objective/kl"] = float(divergence.mean())
    return Experience(
        [completions[i] for i in trained],
        per_token,
        metrics,
        kl=float(divergence.mean()),
        baseline=mean,
        sentence=explain(compared, groups) if baseline in ("group", "leave_one_out") else "",
    )


def equal_groups(scores: np.ndarray, groups: np.ndarray) -> set[int]:
    """The groups whose scores are all equal, or of which at most one answer has a score."""
    return {
        int(g)
        for g in np.unique(groups)
        if len(known := scores[(groups == g) & np.isfinite(scores)]) < 2 or np.ptp(known) < EQUAL
    }


def explain(scores: np.ndarray, groups: np.ndarray) -> str:
    """Why next to nothing can be learned from a step's scores, in a sentence; "" where something can.

    scores: [R] as they are compared.
    """
    equal, count = equal_groups(scores, groups), len(np.unique(groups))
    if len(equal) < MANY * count:
        return ""
    low, high = scores.min(), scores.max()
    # Where the equal groups lie between the step's worst and best answer says what is wrong with them.
    places = [(scores[groups == g].mean() - low) / (high - low) for g in equal] if high - low > EQUAL else []
    if places:
        right = np.mean(np.array(places) > 0.5)
        prompts = "easier prompts" if right <= 0.1 else "harder prompts"
        prompts = (
            prompts if right <= 0.1 or right >= 0.9 else "prompts that are neither too easy nor too hard"
        )
    else:
        prompts = (
            "easier prompts" if high <= 0 else "harder prompts, or easier ones if these answers are wrong"
        )
    samples = int(np.bincount(np.unique(groups, return_inverse=True)[1]).max())
    return (
        f"all {samples} answers of {len(equal)} of {count} prompts earn the same reward: nothing can be "
        f"learned from them; use {prompts}, more samples or a partial reward"
    )


def _metrics(
    scores: np.ndarray, compared: np.ndarray, groups: np.ndarray, completions: Sequence[Completion]
) -> dict[str, float]:
    """Metrics of a step's completions, under TRL's names."""
    lengths = np.array([len(c.tokens) for c in completions])
    ended = np.array([c.stopped for c in completions])
    found = {
        "reward": scores.mean(),
        "reward_std": advantages.group_std(scores, groups).mean(),
        "frac_reward_zero_std": len(equal_groups(compared, groups)) / len(np.unique(groups)),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ended.mean(),
    }
    if ended.any():
        found["completions/mean_terminated_length"] = lengths[ended].mean()
    return {name: float(value) for name, value in found.items()}


def _sampler_metrics(old: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's, under TRL's names."""
    difference = np.concatenate(old) - np.concatenate(sampled)
    return {
        "sampling/sampling_logp_difference/mean": float(np.abs(difference).mean()),
        "sampling/sampling_logp_difference/max": float(np.abs(difference).max()),
        "sampling/importance_sampling_ratio/mean": float(np.exp(difference).mean()),
        "sampling/importance_sampling_ratio/max": float(np.exp(difference).max()),
    }
