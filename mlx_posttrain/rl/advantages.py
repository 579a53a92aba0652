"""From scores to advantages: with a critic by generalised advantage estimation, without one by baselines.

NumPy, outside every gradient.

Shapes: R answers, T tokens, real tokens first; ``mask`` [R, T] is 1 at real tokens and 0 at padding, where
any number may stand. ``groups`` [R] are the numbers of the answers' prompts: answers to one prompt are a
group.
"""

from __future__ import annotations

import numpy as np


def token_rewards(
    logprobs: np.ndarray, reference_logprobs: np.ndarray, scores: np.ndarray, mask: np.ndarray, beta: float
) -> np.ndarray:
    """Reward of each token: -beta (log pi - log ref), and the score on the last real token.

    logprobs, reference_logprobs: [R, T] nats; scores: [R]. Returns [R, T], 0 at padding. Raises ValueError
    for an answer without a token. Ziegler et al. 2019, eq. 2. TRL 1.12 puts the score one slot later where
    the row is padded, and so discounts it once more.
    """
    lengths = mask.sum(1).astype(int)
    if lengths.min(initial=1) < 1:
        raise ValueError(f"answer {int(lengths.argmin())} has no token")
    rewards = np.where(mask > 0, -beta * (_real(logprobs, mask) - _real(reference_logprobs, mask)), 0.0)
    rewards[np.arange(len(rewards)), lengths - 1] += scores
    return rewards


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates, and returns = advantages + values.

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

    rewards, values: [R, T]; the value after an answer's last token is 0, as the episode ends there. Returns
    two [R, T], 0 at padding. Schulman et al. 2016, eq. 16.
    """
    rewards, values = _real(rewards, mask), _real(values, mask)
    advantages = np.zeros_like(values)
    following = np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        # 0 past the last real token, since padding is
        after = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        following = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * following) * (
            mask[:, t] > 0
        )
        advantages[:, t] = following
    return advantages, np.where(mask > 0, advantages + values, 0.0)


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """Values brought to mean 0 and variance 1 over all real tokens together.

    Without ``shift_mean`` their mean stays.

    values: [R, T]. Returns [R, T], 0 at padding. The variance is the unbiased one, with 1e-8 added, as in
    TRL; a single token, or equal ones, become 0 (plus their mean without ``shift_mean``). Huang et al. 2024,
    detail on advantage whitening.
    """
    real = mask > 0
    chosen = values[real]
    mean = chosen.mean() if len(chosen) else 0.0
    variance = chosen.var(ddof=1) if len(chosen) > 1 else 0.0
    white = (_real(values, mask) - mean) / np.sqrt(variance + 1e-8)
    return np.where(real, white if shift_mean else white + mean, 0.0)


def group_mean(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean score of each answer's group: [R], GRPO's baseline (Shao et al. 2024, section 4.1.2)."""
    _, place = np.unique(groups, return_inverse=True)
    return (np.bincount(place, scores) / np.bincount(place))[place]


def leave_one_out(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean score of the other answers in each answer's group: [R], RLOO's baseline.

    An answer without others has its own score, so that it teaches nothing. With n answers, score - baseline
    is n / (n - 1) times what :func:`group_mean` leaves. Kool et al. 2019; Ahmadian et al. 2024, eq. 6.
    """
    _, place = np.unique(groups, return_inverse=True)
    others = np.bincount(place)[place] - 1
    total = np.bincount(place, scores)[place]
    return np.where(others > 0, (total - scores) / np.maximum(others, 1), scores)


def group_std(scores: np.ndarray, groups: np.ndarray, ddof: int = 1) -> np.ndarray:
    """The standard deviation of each answer's group: [R]; 0 for a group of ``ddof`` answers.

    ddof 1 divides the squares by n - 1, as TRL does; 0 by n, as GRPO's paper writes.
    """
    _, place = np.unique(groups, return_inverse=True)
    squares = np.bincount(place, (scores - group_mean(scores, groups)) ** 2)
    return np.sqrt(squares / np.maximum(np.bincount(place) - ddof, 1))[place]


def overlong_penalty(lengths: np.ndarray, max_tokens: int, buffer: int) -> np.ndarray:
    """What is added to the score of a long answer, from 0 down to -1: [R].

    lengths: [R] tokens; an answer loses nothing up to ``max_tokens - buffer``, and from there a share of 1
    that grows to all of it at ``max_tokens``. DAPO's soft overlong punishment: Yu et al. 2025, eq. 13.
    """
    return -np.clip((lengths - (max_tokens - buffer)) / buffer, 0.0, 1.0)


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens.

    1 for a perfect critic, 0 for a constant one; 0 if returns do not vary.
    """
    real = mask > 0
    wanted, said = returns[real], values[real]
    # Equal numbers can have a variance of 1e-34, since their mean is rounded: compare them, not the variance
    # with 0.
    if not len(wanted) or np.ptp(wanted) == 0:
        return 0.0
    return float(1.0 - (wanted - said).var() / wanted.var())


def _real(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask > 0, np.asarray(x, np.float64), 0.0)
