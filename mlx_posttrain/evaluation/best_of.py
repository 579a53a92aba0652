"""Best of n: what a reward model is worth without any training.

The model answers each question n times and the answer that a reward model scores highest is kept (Stiennon et
al. 2020, section 4). Whatever is optimised against the same reward model should be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from mlx_posttrain import config
from mlx_posttrain.console import log
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines.base import Model
from mlx_posttrain.evaluation import completions
from mlx_posttrain.evaluation.comparison import ModelResult, Values
from mlx_posttrain.evaluation.prompting import PromptSettings
from mlx_posttrain.evaluation.reward_scoring import score_answers
from mlx_posttrain.models.open import open_model


class BestOf(config.Section):
    """Answers of the base, chosen from several by a reward model."""

    reward: str = Field(description="the reward-model run or sequence classifier that chooses")
    samples: int = Field(8, ge=2, description="answers to each question that it chooses from")
    seeds: list[int] = Field(
        default_factory=lambda: [0],
        min_length=1,
        description="the answers are drawn once for each; the results are called NAME seed=0 and so on",
    )

    def labels(self, name: str) -> list[str]:
        """What the results are called."""
        return [f"{name} seed={seed}" for seed in self.seeds]


def kl_bound(n: int) -> float:
    """ln n - (n - 1) / n: nats by which best of n differs from the model that it draws from, at most.

    Stiennon et al. 2020, appendix G.3, state it as the KL; Beirami et al. 2024, theorem 1, show that it is an
    upper bound, tight where no answer comes twice.
    """
    return math.log(n) - (n - 1) / n


def measure(
    name: str,
    best: BestOf,
    path: str,
    model: Model,
    tokenizer: Any,
    questions: Sequence[Conversation],
    prompting: PromptSettings,
    engine: str,
) -> list[ModelResult]:
    """One result for each seed, with the chosen answers and whether each ended by itself.

    The answers are drawn from the model as it is (temperature 1, no nucleus), which :func:`kl_bound` assumes.
    An answer that is empty or does not fit the reward model is chosen only where all are. Raises UserError
    as open_model.
    """
    reward_model = open_model(best.reward, engine, scores=True)
    repeated = [q for q in questions for _ in range(best.samples)]
    results = []
    for seed, label in zip(best.seeds, best.labels(name), strict=True):
        log(f"measuring {label}")
        drawn = completions.generate_answers(
            model,
            tokenizer,
            questions,
            template=prompting.template,
            max_tokens=prompting.max_tokens,
            temperature=1.0,
            samples=best.samples,
            seed=seed,
        )
        scores, _ = score_answers(reward_model, repeated, [a.text for a in drawn], prompting.template)
        first = np.arange(len(questions)) * best.samples
        highest = np.nan_to_num(scores, nan=-np.inf).reshape(-1, best.samples).argmax(1)
        chosen = [drawn[i] for i in first + highest]
        result = ModelResult(label, path, template=prompting.template, seed=seed)
        result.answers = [a.text for a in chosen]
        result.answer_kl = kl_bound(best.samples)
        result.values["ended"] = Values(np.array([a.stopped for a in chosen], np.float64))
        result.values["length"] = Values(np.array([len(a.tokens) for a in chosen], np.float64))
        results.append(result)
    return results
