"""Reasoning distillation: supervised fine-tuning on a teacher's thoughts and answers, then what the student
can do with them.

    answer = <think> trace </think> answer        (DeepSeek-AI 2025, "DeepSeek-R1", section 2.4: plain SFT on
    the teacher's outputs)

The loss is that of methods/sft.py. What is added: rows too long for ``data.max_length`` are left out, not cut
(a cut trace has lost its answer), and how many is said; the student answers held-out questions, thinking and
at once, next to the model it started from (``report.json`` has the figures, ``answers.jsonl`` every answer);
and an adapter is merged, into ``merged/``.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_posttrain import config, engines, runs
from mlx_posttrain.console import say
from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines.base import Model
from mlx_posttrain.evaluate import reasoning
from mlx_posttrain.memory import plan as plans
from mlx_posttrain.methods import sft
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.rewards import verify
from mlx_posttrain.training import setup

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
        if not isinstance(self.data.template, str):
            raise ValueError("data.template takes one name here: all questions must be asked alike")
        return self


def run(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Run the recipe to the end; returns the final evaluation with the report's figures. See supervised.run
    for files and errors.
    """

    def judged(
        run: runs.Run, model: Model, tokenizer: Any, held_out: list[Conversation], kept: float
    ) -> dict[str, Any]:
        return judge(recipe, run, model, tokenizer, held_out, kept)

    result = setup.run(recipe, sft.loss, adapter=recipe.adapter, resume=resume, judge=judged)
    # a merge into few bits loses much of an adapter
    if recipe.adapter is not None and recipe.adapter.quantize is None:
        assert recipe.output is not None
        say(f"merged into {base_folder(recipe.output)}")
    return result


def plan(recipe: Recipe) -> list[plans.Plan]:
    """What the training would take; see supervised.planned. The questions asked afterwards come on top in
    time, not in memory.
    """
    return setup.planned(recipe)


def judge(
    recipe: Recipe,
    run: runs.Run,
    student: Model,
    tokenizer: Any,
    held_out: list[Conversation],
    kept: float | None = None,
) -> dict[str, Any]:
    """Ask and compare; writes report.json and answers.jsonl and returns the main figures.

    A thought has what its question leaves of the context, and by default no less room than the longest row
    had in training: what was learned is never cut off. kept: share of the training rows that were not left
    out as too long.
    """
    template = str(recipe.data.template)
    rows = [row for row in held_out if verify.kind(row.extra) is not None]
    room = recipe.think.max_tokens or recipe.data.max_length
    rows = _fitting(rows, tokenizer, template, student.context)[: recipe.think.questions]
    if not rows:
        if recipe.think.questions:
            say(
                "no held-out question has an answer that can be checked and fits the context: nothing is "
                "asked"
            )
        return {}
    thinking = reasoning.measure_reasoning(student, tokenizer, rows, template=template, max_tokens=room)
    at_once = reasoning.measure_reasoning(
        student, tokenizer, rows, template=template, max_tokens=room, prefix=reasoning.EMPTY_THOUGHT
    )
    base = None
    if recipe.think.base and recipe.adapter is not None:
        with student.adapters_off():
            base = reasoning.measure_reasoning(student, tokenizer, rows, template=template, max_tokens=room)
    elif recipe.think.base:
        start = engines.get(recipe.engine).load(base_folder(recipe.model))
        base = reasoning.measure_reasoning(start, tokenizer, rows, template=template, max_tokens=room)
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
    runs.write_text(run.folder / "report.json", json.dumps(figures, indent=2) + "\n")
    runs.write_text(
        run.folder / "answers.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    )
    say("\n".join(reasoning.summary_lines(figures)))
    return {name: figures[name].mean for name in ("accuracy", "accuracy_at_once", "format_rate")}


def _fitting(
    rows: list[Conversation], tokenizer: Any, template: str, context: int | None
) -> list[Conversation]:
    """The rows whose question leaves LEAST_ROOM tokens for thought and answer; says how many do not."""
    if context is None or not rows:
        return rows
    lengths = [
        len(ids)
        for ids in encode.encode_prompts(
            [row.turns[:-1] for row in rows], tokenizer, template, templated=rows[0].templated
        )
    ]
    begun = len(tokenizer(reasoning.EMPTY_THOUGHT, add_special_tokens=False)["input_ids"])
    kept = [row for row, length in zip(rows, lengths, strict=True) if length + begun + LEAST_ROOM <= context]
    if len(kept) < len(rows):
        say(
            f"{len(rows) - len(kept)} of {len(rows)} questions are too long to be answered in the model's "
            "context and are left out"
        )
    return kept
