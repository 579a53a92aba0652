"""Reasoning distillation: SFT on a teacher's thoughts and answers, then a test of the student.

    answer = <think> trace </think> answer

DeepSeek-AI 2025, "DeepSeek-R1", section 2.4: plain SFT on the teacher's outputs.

The loss is that of methods/sft.py. What is added: rows too long for ``data.max_length`` are left out, not cut
(a cut trace has lost its answer), and how many is said; the student answers held-out questions, thinking and
at once, next to the model it started from (``report.json`` has the figures, ``answers.jsonl`` every answer);
and an adapter is merged, into ``merged/``.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_posttrain import config, runs
from mlx_posttrain.console import log
from mlx_posttrain.data import encode
from mlx_posttrain.data.read import row_dataset
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import reasoning
from mlx_posttrain.methods import sft
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.rewards import verify
from mlx_posttrain.training.method import Method
from mlx_posttrain.training.session import Session

LEAST_ROOM = 32  # tokens: a question that leaves less in the context has no room for a thought


class ThinkSection(config.Section):
    """The questions that are asked afterwards."""

    questions: int = Field(
        200, ge=0, description="held-out questions whose answer can be checked, asked after training; 0: none"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="longest output, thought and answer; null: as long as the longest training "
        "row, data.max_length",
    )
    base: bool = Field(True, description="ask the model before training as well")


class Recipe(config.Recipe):
    """Supervised fine-tuning on thoughts."""

    method: Literal["distill"] = Field(description="distill: imitate a teacher's thoughts and answers")
    adapter: config.AdapterSection | None = Field(
        None, description="train an adapter instead of all weights; null: all weights"
    )
    think: ThinkSection = Field(default_factory=lambda: ThinkSection())

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        config.check_training(self)
        if any(part.template != self.data.template for part in self.data.parts.values()) or not isinstance(
            self.data.template, str
        ):
            raise ValueError("data.template takes one name here: all questions must be asked alike")
        return self


def report(session: Session) -> dict[str, Any]:
    """Ask held-out questions; writes report.json and answers.jsonl and returns the main figures.

    A thought has what its question leaves of the context, and by default no less room than the longest row
    had in training: what was learned is never cut off.
    """
    recipe, student, tokenizer = session.recipe, session.model, session.facts.tokenizer
    dataset = session.dataset
    assert dataset is not None
    ask = {
        "template": str(recipe.data.template),
        "max_tokens": recipe.think.max_tokens or recipe.data.max_length,
    }
    checked = [row for row in dataset.held_out_rows if verify.kind(row.extra) is not None]
    rows = _fitting(checked, tokenizer, ask["template"], student.context)[: recipe.think.questions]
    if not rows:
        if recipe.think.questions:
            log(
                "no held-out question has an answer that can be checked and fits the context: nothing is "
                "asked"
            )
        return {}
    thinking = reasoning.measure_reasoning(student, tokenizer, rows, **ask)
    at_once = reasoning.measure_reasoning(student, tokenizer, rows, **ask, prefix=reasoning.EMPTY_THOUGHT)
    base = None
    if recipe.think.base and recipe.adapter is not None:
        with student.adapters_off():
            base = reasoning.measure_reasoning(student, tokenizer, rows, **ask)
    elif recipe.think.base:
        start = session.engine.load(session.folder, dtype=recipe.dtype, vocabulary=session.facts.vocabulary)
        base = reasoning.measure_reasoning(start, tokenizer, rows, **ask)
    kept = len(dataset.train) / len(dataset.train_rows)  # the others were too long
    figures = reasoning.summarize(thinking, at_once, base, kept)
    records = [
        {
            "question": row.turns[-2].content,
            "wanted": row.extra.get("answer"),
            "thinking": thinking.texts[i],
            "right": bool(thinking.correct[i]),
            "at_once": at_once.texts[i],
            "right_at_once": bool(at_once.correct[i]),
        }
        for i, row in enumerate(rows)
    ]
    folder = session.run.folder
    runs.write_text(folder / "report.json", json.dumps(figures, indent=2) + "\n")
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    runs.write_text(folder / "answers.jsonl", lines)
    log("\n".join(reasoning.summary_lines(figures)))
    return {name: figures[name].mean for name in ("accuracy", "accuracy_at_once", "format_rate")}


def merge(session: Session) -> None:
    """Merge an adapter into its base, in ``merged/``; not into few bits, where much of it would be lost."""
    adapter = session.recipe.adapter
    if adapter is not None and adapter.quantize is None:
        log(f"merged into {base_folder(session.run.folder)}")


def _fitting(
    rows: list[Conversation], tokenizer: Any, template: str, context: int | None
) -> list[Conversation]:
    """The rows whose question leaves LEAST_ROOM tokens for thought and answer; says how many do not."""
    if not rows:
        return rows
    found = encode.try_prompts(
        [row.turns[:-1] for row in rows], tokenizer, template, templated=rows[0].templated
    )
    begun = len(tokenizer(reasoning.EMPTY_THOUGHT, add_special_tokens=False)["input_ids"])
    room = 2**31 if context is None else context - begun - LEAST_ROOM
    kept = [
        row
        for row, ids in zip(rows, found, strict=True)
        if not isinstance(ids, UserError) and len(ids) <= room
    ]
    if len(kept) < len(rows):
        log(
            f"{len(rows) - len(kept)} of {len(rows)} rows have no question, or one too long to be answered "
            "in the model's context, and are left out"
        )
    return kept


METHOD = Method(
    name="distill",
    summary="reasoning distillation: imitate a teacher's thoughts and answers, then compare",
    Recipe=Recipe,
    dataset=row_dataset,
    loss=lambda recipe: sft.loss,
    report=report,
    after=merge,
)
