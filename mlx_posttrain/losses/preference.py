"""Losses of preferences: of two answers to a prompt the first is better, or one answer is good or bad.

All functions are elementwise over P pairs or R rows; :func:`mlx_posttrain.losses.sft.token_mean` averages
them. Their arguments are of three kinds, each the sum over an answer's tokens, its end included:

    scores       r(x, y), of a reward model
    log-ratios   log pi(y|x) - log pi_ref(y|x), of policy and frozen reference; beta times it is the answer's
                 implicit reward (Rafailov et al. 2023, eq. 5)
    log-probs    log pi(y|x), where there is no reference

``_w`` in a formula is the chosen answer, ``_l`` the rejected one, h = log-ratio_w - log-ratio_l.
"""

from __future__ import annotations

import math
from typing import Any

from mlx_posttrain.ops import ops

Array = Any


# Reward models: scores


def bradley_terry(chosen: Array, rejected: Array, margin: Array | float = 0.0) -> Array:
    """Negative log-likelihood of the preference: -log sigma(r_w - r_l - margin), in nats.

    chosen, rejected: [P] scores; margin: a number or [P]. Returns [P]; ln 2 where the scores are equal.
    Bradley & Terry 1952; Stiennon et al. 2020, section 3.4; with a margin Touvron et al. 2023 (Llama 2), eq.
    2.
    """
    return -ops(chosen).log_sigmoid(chosen - rejected - margin)


def centering(chosen: Array, rejected: Array) -> Array:
    """(r_w + r_l)^2, to be added with a small weight to keep scores around 0.

    A pair alone fixes only the difference of its scores. chosen, rejected: [P] scores. Returns [P].
    Eisenstein et al. 2023, "Helping or Herding?", section 2.
    """
    return (chosen + rejected) ** 2


# Pairs with a reference: log-ratios. Each returns [P].


def dpo(
    chosen: Array, rejected: Array, beta: float, label_smoothing: float = 0.0, margin: Array | float = 0.0
) -> Array:
    """Direct preference optimisation: -log sigma(beta h - margin).

    chosen, rejected: [P] log-ratios. Rafailov et al. 2023, eq. 7; ln 2 where policy and reference agree.
    ``label_smoothing`` is the share of labels taken to be wrong: conservative DPO, Mitchell 2023. With
    a ``margin`` ([P] or a number) the gap must exceed it: Amini et al. 2024 (ODPO).
    """
    xp, logits = ops(chosen), beta * (chosen - rejected) - margin
    loss = -xp.log_sigmoid(logits)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * xp.log_sigmoid(-logits)
    return loss


def robust(chosen: Array, rejected: Array, beta: float, label_smoothing: float) -> Array:
    """DPO's loss unbiased by labels of which a share is flipped: Chowdhury et al. 2024 (rDPO).

    [(1 - e)(-log sigma(beta h)) - e (-log sigma(-beta h))] / (1 - 2e). chosen, rejected: [P] log-ratios;
    label_smoothing: e, below 1/2. It may be negative.
    """
    xp, logits, e = ops(chosen), beta * (chosen - rejected), label_smoothing
    return (e * xp.log_sigmoid(-logits) - (1 - e) * xp.log_sigmoid(logits)) / (1 - 2 * e)


def ipo(chosen: Array, rejected: Array, beta: float) -> Array:
    """Identity preference optimisation: (h - 1 / (2 beta))^2.

    chosen, rejected: [P] log-ratios; the paper's are sums over tokens, TRL's means. Azar et al. 2023, eq. 17,
    whose tau is beta. It has a finite optimum, so that a deterministic preference does not drive h to
    infinity.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: Array, rejected: Array, beta: float, margin: Array | float = 0.0) -> Array:
    """max(0, 1 + margin - beta h): Zhao et al. 2023 (SLiC-HF), on log-ratios as Liu et al. 2023 (RSO).

    chosen, rejected: [P] log-ratios; margin: [P] or a number.
    """
    return ops(chosen).maximum(1 + margin - beta * (chosen - rejected), 0.0)


def apo_zero(chosen: Array, rejected: Array, beta: float) -> Array:
    """Anchored preference optimisation for chosen answers better than the policy's own.

    1 - sigma(beta c) + sigma(beta r): chosen answers become likelier, rejected ones less. chosen, rejected:
    [P] log-ratios. D'Oosterlinck et al. 2024, APO-zero.
    """
    xp = ops(chosen)
    return 1 - xp.sigmoid(beta * chosen) + xp.sigmoid(beta * rejected)


def apo_down(chosen: Array, rejected: Array, beta: float) -> Array:
    """Anchored preference optimisation for chosen answers worse than the policy's own.

    sigma(beta c) + 1 - sigma(beta h): both become less likely, rejected answers more so. chosen, rejected:
    [P] log-ratios. D'Oosterlinck et al. 2024, APO-down.
    """
    xp = ops(chosen)
    return xp.sigmoid(beta * chosen) + 1 - xp.sigmoid(beta * (chosen - rejected))


def exo_pair(chosen: Array, rejected: Array, beta: float, label_smoothing: float = 1e-3) -> Array:
    """Reverse KL from the policy's preference to the smoothed label: Ji et al. 2024 (EXO), eq. 16.

    chosen, rejected: [P] log-ratios; label_smoothing: above 0, where the logarithm of the label exists.
    """
    xp, logits = ops(chosen), beta * (chosen - rejected)
    for_chosen, for_rejected = xp.log_sigmoid(logits), xp.log_sigmoid(-logits)
    return xp.exp(for_chosen) * (for_chosen - math.log(1 - label_smoothing)) + xp.exp(for_rejected) * (
        for_rejected - math.log(label_smoothing)
    )


def nca_pair(chosen: Array, rejected: Array, beta: float) -> Array:
    """Noise contrastive alignment of two answers: Chen et al. 2024 (NCA).

    -log sigma(beta c) - (log sigma(-beta c) + log sigma(-beta r)) / 2. chosen, rejected: [P] log-ratios.
    """
    xp = ops(chosen)
    noise = xp.log_sigmoid(-beta * chosen) + xp.log_sigmoid(-beta * rejected)
    return -xp.log_sigmoid(beta * chosen) - noise / 2


def sppo_hard(chosen: Array, rejected: Array, beta: float) -> Array:
    """Self-play preference optimisation with hard labels: Wu et al. 2024 (SPPO).

    (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2. chosen, rejected: [P] log-ratios.
    """
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def discopop(chosen: Array, rejected: Array, beta: float, temperature: float = 0.05) -> Array:
    """The log-ratio modulated loss that was found by search: Lu et al. 2024 (DiscoPOP), eq. 5.

    Between DPO's loss, where beta h is low, and exp(-beta h). chosen, rejected: [P] log-ratios.
    """
    xp, logits = ops(chosen), beta * (chosen - rejected)
    share = xp.sigmoid(logits / temperature)
    return -xp.log_sigmoid(logits) * (1 - share) + xp.exp(-logits) * share


def bco_pair(chosen: Array, rejected: Array, beta: float, shift: Array | float) -> Array:
    """Binary classifier optimisation: -log sigma(beta c - d) - log sigma(d - beta r).

    chosen, rejected: [P] log-ratios; shift: d, a mean of earlier implicit rewards, without gradient. Jung et
    al. 2024.
    """
    xp = ops(chosen)
    return -xp.log_sigmoid(beta * chosen - shift) - xp.log_sigmoid(shift - beta * rejected)


def aot(chosen: Array, rejected: Array, chosen_ref: Array, rejected_ref: Array, beta: float) -> Array:
    """Alignment by optimal transport of paired answers: the policy's sorted gaps against the reference's.

    All [P] log-probs; the loss belongs to the batch, since it sorts. Melnyk et al. 2024.
    """
    gap = _sorted(chosen - rejected) - _sorted(chosen_ref - rejected_ref)
    return -ops(chosen).log_sigmoid(beta * gap)


def aot_unpaired(chosen: Array, rejected: Array, beta: float) -> Array:
    """The same of answers that belong to no pair: [P] sorted log-ratios of either kind. Ibid."""
    return -ops(chosen).log_sigmoid(beta * (_sorted(chosen) - _sorted(rejected)))


def _sorted(values: Array) -> Array:
    xp = ops(values)
    order = xp.stop_gradient(xp.argsort_descending(values, axis=0))
    return xp.take_along_axis(values, order, axis=0)


# Pairs without a reference: log-probs. Each returns [P].


def cpo(chosen: Array, rejected: Array, beta: float, label_smoothing: float = 0.0) -> Array:
    """Contrastive preference optimisation, without its imitation of chosen answers.

    DPO with a uniform reference: -log sigma(beta (log pi_w - log pi_l)). chosen, rejected: [P] log-probs. The
    paper adds the negative log-likelihood of the chosen answer. Xu et al. 2024.
    """
    return dpo(chosen, rejected, beta, label_smoothing)


def simpo(chosen: Array, rejected: Array, beta: float, gamma: float) -> Array:
    """Simple preference optimisation: -log sigma(beta (m_w - m_l) - gamma).

    chosen, rejected: [P] mean log-probs m of a token. Meng et al. 2024, eq. 6; its gamma, not its ratio
    gamma / beta.
    """
    return -ops(chosen).log_sigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio(chosen: Array, rejected: Array) -> Array:
    """ORPO's second term: -log sigma(log odds_w - log odds_l), odds p / (1 - p) of the mean token.

    chosen, rejected: [P] mean log-probs of a token, below 0. The paper adds it with the weight lambda to the
    negative log-likelihood of the chosen answer. Hong et al. 2024, eq. 6 and 7.
    """
    xp = ops(chosen)
    return -xp.log_sigmoid(chosen - rejected - log1mexp(chosen) + log1mexp(rejected))


def log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0; x within 1e-7 of 0 counts as -1e-7.

    There the probability is 1 in float32 and its odds are infinite.
    """
    xp = ops(x)
    return xp.log(-xp.expm1(xp.minimum(x, -1e-7)))


# Single answers: log-ratios and labels. Each returns [R].


def kto(log_ratio: Array, label: Array, kl: Array | float, beta: float) -> Array:
    """Kahneman-Tversky optimisation: 1 - sigma(beta (g - z)), and of a bad answer 1 - sigma(beta (z - g)).

    log_ratio: [R] g; label: [R] 1 for good, 0 for bad; kl: z, see :func:`kto_baseline`. The paper weights the
    two kinds by lambda_D and lambda_U. Ethayarajh et al. 2024, eq. 7.
    """
    return 1 - ops(log_ratio).sigmoid(beta * (2 * label - 1) * (log_ratio - kl))


def kto_baseline(log_ratio: Array) -> Array:
    """z of :func:`kto`: the mean log-ratio of answers to other rows' prompts, at least 0, without gradient.

    log_ratio: [R]. A biased, cheap estimate of KL(policy || reference), in nats an answer. Ibid.
    """
    xp = ops(log_ratio)
    return xp.stop_gradient(xp.maximum(xp.mean(log_ratio), 0.0))


def apo_zero_unpaired(log_ratio: Array, label: Array, beta: float) -> Array:
    """:func:`apo_zero` for single answers: 1 - sigma(beta g) of a good one, sigma(beta g) of a bad one."""
    return 1 - ops(log_ratio).sigmoid(beta * (2 * label - 1) * log_ratio)
