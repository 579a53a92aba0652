"""Losses of a reward model: the preferred one of two completions of a prompt should score higher.

All functions are elementwise over pairs; :func:`mlx_posttrain.losses.sft.token_mean` averages them. Shape: P
pairs.
"""

from __future__ import annotations

from typing import Any

from mlx_posttrain.ops import ops

Array = Any


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
