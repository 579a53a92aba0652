"""Scores that a reward model gives to the answers of compared models, and win rates against baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines.base import Model
from mlx_posttrain.evaluation.comparison import ModelResult, Values
from mlx_posttrain.evaluation.preference import length_controlled_wins
from mlx_posttrain.models.source import Source
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards.answers import after_thought


def score_answers(
    reward_model: tuple[Model, Any, Source],
    questions: Sequence[Conversation],
    answers: Sequence[str],
    template: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The reward model's scores of the answers, and the answers' lengths in its tokens: [R] each.

    reward_model: model, tokenizer and source; template: used where the source has none. Thoughts are left
    out, because reward models are trained on answers. An answer with nothing left scores -inf, and one that
    does not fit the reward model's context nan.
    """
    from mlx_posttrain.data.pairs import encode_answers
    from mlx_posttrain.rewards.scorer import score_rows

    model, tokenizer, source = reward_model
    final_answers = [after_thought(answer) for answer in answers]
    rows = encode_answers(
        [q.turns[:-1] for q in questions],
        final_answers,
        tokenizer,
        source.template or template,
        model.context,
    )
    scores = np.array([np.nan if text.strip() else -np.inf for text in final_answers])
    scored = [i for i, row in enumerate(rows) if row is not None]
    scores[scored] = score_rows(
        model, [row for row in rows if row is not None], pad_id(model.config, tokenizer)
    )
    return scores, np.array(
        [
            len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            for text in final_answers
        ],
        np.float64,
    )


def add_reward_metrics(
    results: Sequence[ModelResult], scores: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Fill in ``score`` and ``wins`` from the scores and lengths of each model's answers.

    Leaving empty answers out would reward a model for writing nothing: they lose, and get the lowest score of
    any answer of any model. Their number is printed.
    """
    lowest = min((float(s[np.isfinite(s)].min()) for s, _ in scores if np.isfinite(s).any()), default=np.nan)
    for place, (result, (model_scores, lengths)) in enumerate(zip(results, scores, strict=True)):
        empty = np.isneginf(model_scores)
        if empty.any():
            log(
                f"{result.name}: {empty.sum()} of {len(model_scores)} answers are empty; they count as lost, "
                "with the lowest score of all answers"
            )
        result.values["score"] = Values(np.where(empty, lowest, model_scores))
        if result.baseline_index != place:
            baseline_scores, baseline_lengths = scores[result.baseline_index]
            wins = length_controlled_wins(model_scores, baseline_scores, lengths, baseline_lengths)
            result.values["wins"] = Values(wins)
            if np.isnan(wins).all() and np.isfinite(model_scores).any():
                gap = lengths.mean() - baseline_lengths.mean()
                log(
                    f"{result.name}: no win rate against {results[result.baseline_index].name}: lengths "
                    f"differ too much for a comparison at equal length ({gap:+.1f} tokens)"
                )
