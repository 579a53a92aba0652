"""What a model that thinks before it answers is worth: right answers with and without the thought, and the
shape of the thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.parsers import END_THINK, THINK
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines.base import Model
from mlx_posttrain.evaluate import measure
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, paired_bootstrap, share
from mlx_posttrain.rewards.verify import verify

#: An empty thought: after it a model answers at once (Ma et al. 2025, "Reasoning Models Can Be Effective
#: Without Thinking").
AT_ONCE = f"{THINK}\n\n{END_THINK}\n"

_FORM = re.compile(rf"\s*{THINK}(?P<trace>.*?){END_THINK}(?P<answer>.*)", re.DOTALL)
_STEP = re.compile(r"^\s*(?:step\s*\d+|\d+[.)]|[-*])?\s*\S", re.IGNORECASE)
_CUES = {
    "connectives": r"\b(?:because|since|so|therefore|thus|hence|then)\b|=",
    "order": r"\b(?:first|second|next|finally|step|let)\b|\n",
    "checking": r"\b(?:check|verify|wait|make sure|confirm|is right)\b",
    "conclusion": r"\b(?:so the answer|the answer is|in conclusion|therefore)\b|=\s*\S+\s*$",
}


@dataclass(frozen=True)
class Thinking:
    """What one model did on R questions that can be checked; [R] arrays, in the questions' order."""

    right: np.ndarray
    """1 for a right final answer, else 0."""
    formed: np.ndarray
    """1 for exactly one closed thought, not empty, and an answer after it."""
    ended: np.ndarray
    """1 for an output that ended by itself, 0 for one that the limit or the context cut off."""
    trace_tokens: np.ndarray
    """Tokens of the thought alone; of one that was never closed, to the end; 0 without a thought."""
    output_tokens: np.ndarray
    """Tokens of the whole output, thought and answer, without what was put into the model's mouth."""
    steps: np.ndarray
    """Lines of the thought (see ``steps_of``)."""
    heuristic: np.ndarray
    """``shape_score`` of the output, 0 to 1: it judges the look of a thought and not its truth."""
    texts: list[str]


def thought_of(text: str) -> tuple[str, str] | None:
    """(thought, answer) of an output with exactly one closed thought, both not empty; None for any other."""
    found = _FORM.fullmatch(text)
    if found is None or text.count(THINK) != 1 or text.count(END_THINK) != 1:
        return None
    trace, answer = found["trace"].strip(), found["answer"].strip()
    return (trace, answer) if trace and answer else None


def trace_of(text: str) -> str:
    """What stands between the first ``<think>`` and the ``</think>`` after it, or the end where none comes;
    "" without a thought.
    """
    return text.partition(THINK)[2].partition(END_THINK)[0].strip()


def steps_of(text: str) -> int:
    """Lines of text in the thought of an output, 0 where there is no closed thought: how far it goes on, not
    whether it leads anywhere.
    """
    found = thought_of(text)
    return sum(bool(_STEP.match(line)) for line in found[0].splitlines()) if found else 0


def shape_score(text: str) -> float:
    """Mean of the five marks of a "good" thought that this project's origin looked for: its form,
    connectives, order, checking, a conclusion. 0 to 1, ceiling 1.

    A keyword score of the kind that the origin reported as reasoning quality; it is given for comparison
    only, because a model can learn the words without the thought, and because it does not look at the answer.
    """
    found = thought_of(text)
    trace = found[0].lower() if found else ""
    return (bool(found) + sum(bool(re.search(cue, trace)) for cue in _CUES.values())) / (1 + len(_CUES))


def think(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Conversation],
    *,
    template: str,
    max_tokens: int,
    begin: str = "",
) -> Thinking:
    """Ask every row greedily and judge the answers by the rows' own rules (evaluate/verify.py).

    rows: conversations whose ``extra`` can be verified. ``begin`` is put into the model's mouth; ``AT_ONCE``
    leaves no room to think. An output is at most ``max_tokens`` long, and shorter where question, ``begin``
    and output fill the context. Raises UserError as measure.answers.
    """
    found = measure.answers(model, tokenizer, rows, template=template, max_tokens=max_tokens, begin=begin)
    texts = [a.text for a in found]
    return Thinking(
        right=np.array(
            [bool(verify(row.extra, text)) for row, text in zip(rows, texts, strict=True)], np.float64
        ),
        formed=np.array([thought_of(text) is not None for text in texts], np.float64),
        ended=np.array([a.stopped for a in found], np.float64),
        trace_tokens=np.array(
            [
                len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
                for t in map(trace_of, texts)
            ],
            np.float64,
        ),
        output_tokens=np.array([len(a.tokens) for a in found], np.float64),
        steps=np.array([steps_of(text) for text in texts], np.float64),
        heuristic=np.array([shape_score(text) for text in texts], np.float64),
        texts=texts,
    )


def summary(
    thinking: Thinking, at_once: Thinking, base: Thinking | None = None, kept: float | None = None
) -> dict[str, Any]:
    """The figures of a report: means with 95 % intervals over questions, and paired differences.

    kept: share of the training rows that were short enough to train on, where it is known.
    """
    figures: dict[str, Any] = {
        "questions": len(thinking.right),
        "accuracy": share(thinking.right),
        "accuracy_at_once": share(at_once.right),
        "thinking_minus_at_once": paired_bootstrap(thinking.right, at_once.right),
        "format_rate": share(thinking.formed),
        "ended": share(thinking.ended),
        "trace_tokens": bootstrap(thinking.trace_tokens),
        "output_tokens": float(thinking.output_tokens.mean()),
        "steps": float(thinking.steps.mean()),
        "shape_score": float(thinking.heuristic.mean()),
        "shape_score_of_wrong_answers": float(thinking.heuristic[thinking.right == 0].mean())
        if (thinking.right == 0).any()
        else None,
    }
    if kept is not None:
        figures["kept"] = kept
    if base is not None:
        figures |= {
            "base_accuracy": share(base.right),
            "gain": paired_bootstrap(thinking.right, base.right),
            "base_shape_score": float(base.heuristic.mean()),
        }
    return figures


def lines(figures: dict[str, Any]) -> list[str]:
    """The same for people."""

    def said_of(value: Interval) -> str:
        return f"{value.mean:.1%} [{value.low:.0%}, {value.high:.0%}]"

    said = [
        f"right answers on {figures['questions']} held-out questions: {said_of(figures['accuracy'])} after "
        "thinking, "
        f"{said_of(figures['accuracy_at_once'])} when made to answer at once",
        f"form kept in {said_of(figures['format_rate'])}, ended by itself in {said_of(figures['ended'])}; "
        f"{figures['trace_tokens'].mean:.0f} "
        f"tokens and {figures['steps']:.1f} lines a thought",
        "look of the thoughts (the origin's five keyword marks, for comparison only): "
        f"{figures['shape_score']:.2f} of 1"
        + (
            f", of wrong answers {figures['shape_score_of_wrong_answers']:.2f}"
            if figures["shape_score_of_wrong_answers"] is not None
            else ""
        ),
    ]
    if "base_accuracy" in figures:
        said.insert(
            1,
            f"the model before training: {said_of(figures['base_accuracy'])}; gain "
            f"{said_of(figures['gain'])}",
        )
    return said
