"""What runs show: each finding is a sentence with its numbers, charts, and a verdict.

The questions are those that people ask after fine-tuning: what was forgotten, where the weights moved, how
foreign the training data are, where greedy decoding loops, whether templates interfere, whether a run
overfits, whether a lower loss makes a better model, and what preference optimisation did to the answers.

A finding about several models or pairs asks several questions at once. Where it tests them it uses
metrics.sign_flip with Holm's correction, so that of twenty reports in which nothing differs one says "yes";
where it draws intervals, they allow for the number of questions.
"""

from mlx_posttrain.evaluation.findings.base import Finding, Verdict
from mlx_posttrain.evaluation.findings.behaviour import empty_cache, forgetting, loss_and_quality, repetition
from mlx_posttrain.evaluation.findings.preference import better_or_longer, margin_source
from mlx_posttrain.evaluation.findings.training import data_shift, drift, interference, overfitting

__all__ = [
    "Finding",
    "Verdict",
    "better_or_longer",
    "data_shift",
    "drift",
    "empty_cache",
    "forgetting",
    "interference",
    "loss_and_quality",
    "margin_source",
    "overfitting",
    "repetition",
]
