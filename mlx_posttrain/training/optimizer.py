"""The optimizer's settings, the same on both engines."""

from __future__ import annotations

from mlx_posttrain.config import OptimizerSection
from mlx_posttrain.engines.base import AdamW


def adamw(train: OptimizerSection) -> AdamW:
    """AdamW as a recipe wants it."""
    return AdamW(train.beta1, train.beta2, train.eps, train.weight_decay, train.max_grad_norm)
