"""Evaluation of models that think before they answer: accuracy with and without the thought, and its form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.types import END_THINK, THINK, Conversation
from mlx_posttrain.engines.base import Model
from mlx_posttrain.evaluation import completions
from mlx_posttrain.evaluation.metrics import Interval, bootstrap, paired_bootstrap, proportion
from mlx_posttrain.rewards.verify import verify

#: An empty thought, after which a model answers at once (Ma et al. 2025, "Reasoning Models Can Be Effective
#: Without Thinking").
EMPTY_THOUGHT = f"{THINK}\n\n{END_THINK}\n"

_FORM = re.compile(rf"\s*{THINK}(?P<trace>.*?){END_THINK}(?P<answer>.*)", re.DOTALL)
_CUES = {
    "connectives": r"\b(?:because|since|so|therefore|thus|hence|then)\b|=",
    "order": r"\b(?:first|second|next|finally|step|let)\b|\n",
    "checking": r"\b(?:check|verify|wait|make sure|confirm|is right)\b",
    "conclusion": r"\b(?:so the answer|the answer is|in conclusion|therefore)\b|=\s*[^\s=]+$",
}


@dataclass(frozen=True)
class ReasoningResult:
    """What one model did on R questions that can be checked; [R] arrays, in the order of the questions."""

    correct: np.ndarray
    """1 for a correct final answer, else 0."""
    well_formed: np.ndarray
    """1 for exactly one closed thought, not empty, with an answer after it."""
    stopped: np.ndarray
    """1 for an output that the model ended, 0 for one that the limit or the context cut off."""
    trace_tokens: np.ndarray
    """Tokens of the thought alone, up to the end where it was never closed; 0 without a thought."""
    output_tokens: np.ndarray
    """Tokens of the whole output, thought and answer, without a given prefix."""
    steps: np.ndarray
    """Lines of the thought (see ``count_steps``)."""
    shape_scores: np.ndarray
    """``shape_score`` of the output, 0 to 1, which rates the form of a thought and not whether it is true."""
    texts: list[str]


def split_thought(text: str) -> tuple[str, str] | None:
    """(thought, answer) of an output with exactly one closed thought, both not empty; None for any other."""
    match = _FORM.fullmatch(text)
    if match is None or text.count(THINK) != 1 or text.count(END_THINK) != 1:
        return None
    trace, answer = match["trace"].strip(), match["answer"].strip()
    return (trace, answer) if trace and answer else None


def extract_trace(text: str) -> str:
    """The text between the first ``<think>`` and the next ``</think>``, or the end; "" without a thought."""
    return text.partition(THINK)[2].partition(END_THINK)[0].strip()


def count_steps(text: str) -> int:
    """Lines of text in the closed thought of an output, 0 without one.

    The number says how long a thought is, not whether it leads anywhere.
    """
    parts = split_thought(text)
    return sum(bool(line.strip()) for line in parts[0].splitlines()) if parts else 0


def shape_score(text: str) -> float:
    """Share of five marks of a "good" thought: form, connectives, order, checking and a conclusion.

    Range 0 to 1, ceiling 1. Given for comparison only, because a model can learn such keywords without the
    thought, and because the score does not look at the answer.
    """
    parts = split_thought(text)
    trace = parts[0].lower() if parts else ""
    return (bool(parts) + sum(bool(re.search(cue, trace)) for cue in _CUES.values())) / (1 + len(_CUES))


def measure_reasoning(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Conversation],
    *,
    template: str,
    max_tokens: int,
    prefix: str = "",
) -> ReasoningResult:
    """Answer every row greedily and check the answers by the rows' rules (rewards/verify.py).

    rows: conversations whose ``extra`` can be verified. prefix: the beginning of every output, which the
    model continues; after ``EMPTY_THOUGHT`` it cannot think. An output has at most ``max_tokens`` tokens, and
    fewer where question, prefix and output fill the context. Raises UserError as
    completions.generate_answers.
    """
    answers = completions.generate_answers(
        model, tokenizer, rows, template=template, max_tokens=max_tokens, prefix=prefix
    )
    texts = [a.text for a in answers]
    return ReasoningResult(
        correct=np.array(
            [bool(verify(row.extra, text)) for row, text in zip(rows, texts, strict=True)], np.float64
        ),
        well_formed=np.array([split_thought(text) is not None for text in texts], np.float64),
        stopped=np.array([a.stopped for a in answers], np.float64),
        trace_tokens=np.array(
            [
                len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
                for t in map(extract_trace, texts)
            ],
            np.float64,
        ),
        output_tokens=np.array([len(a.tokens) for a in answers], np.float64),
        steps=np.array([count_steps(text) for text in texts], np.float64),
        shape_scores=np.array([shape_score(text) for text in texts], np.float64),
        texts=texts,
    )


def summarize(
    thinking: ReasoningResult,
    at_once: ReasoningResult,
    base: ReasoningResult | None = None,
    kept: float | None = None,
) -> dict[str, Any]:
    """The contents of a run's report.json: means with 95 % intervals over questions, and paired differences.

    thinking, at_once: the model's results with a thought and after ``EMPTY_THOUGHT``; base: the results of
    the model before training; kept: share of the training rows that were short enough to train on, where it
    is known.
    """
    incorrect = thinking.correct == 0
    stats: dict[str, Any] = {
        "questions": len(thinking.correct),
        "accuracy": proportion(thinking.correct),
        "accuracy_at_once": proportion(at_once.correct),
        "thinking_minus_at_once": paired_bootstrap(thinking.correct, at_once.correct),
        "format_rate": proportion(thinking.well_formed),
        "ended": proportion(thinking.stopped),
        "trace_tokens": bootstrap(thinking.trace_tokens),
        "output_tokens": float(thinking.output_tokens.mean()),
        "steps": float(thinking.steps.mean()),
        "shape_score": float(thinking.shape_scores.mean()),
        "shape_score_of_wrong_answers": float(thinking.shape_scores[incorrect].mean())
        if incorrect.any()
        else None,
    }
    if kept is not None:
        stats["kept"] = kept
    if base is not None:
        stats |= {
            "base_accuracy": proportion(base.correct),
            "gain": paired_bootstrap(thinking.correct, base.correct),
            "base_shape_score": float(base.shape_scores.mean()),
        }
    return stats


def summary_lines(stats: dict[str, Any]) -> list[str]:
    """The result of ``summarize`` in words."""

    def percent(value: Interval) -> str:
        return f"{value.mean:.1%} [{value.low:.0%}, {value.high:.0%}]"

    wrong = stats["shape_score_of_wrong_answers"]
    lines = [
        f"right answers on {stats['questions']} held-out questions: {percent(stats['accuracy'])} after "
        f"thinking, {percent(stats['accuracy_at_once'])} when made to answer at once",
        f"well-formed thoughts in {percent(stats['format_rate'])}, ended by itself in "
        f"{percent(stats['ended'])}; {stats['trace_tokens'].mean:.0f} tokens and {stats['steps']:.1f} lines "
        "per thought",
        f"keyword score of the thoughts (five marks, for comparison only): {stats['shape_score']:.2f} of 1"
        + (f", that of wrong answers {wrong:.2f}" if wrong is not None else ""),
    ]
    if "base_accuracy" in stats:
        lines.insert(
            1, f"the model before training: {percent(stats['base_accuracy'])}; gain {percent(stats['gain'])}"
        )
    return lines
