"""How each model of a comparison is asked: in which template, with which system prompt, and with how much
room for its answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mlx_posttrain.console import say
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.models.source import Source

OWN = "own"  # the template setting that leaves each model its own


class Way(NamedTuple):
    """How one model is asked: template, system prompt, longest answer in tokens."""

    template: str
    system: str | None
    max_tokens: int


def ways(
    located: Sequence[Source], *, template: str = OWN, max_tokens: int, think_tokens: int | None = None
) -> list[Way]:
    """One way for each model.

    ``template`` is one for all, or ``OWN``: a run is asked as it was trained, a model that is no run as most
    of the runs are. A run that was distilled to think has ``think_tokens`` of room, null: as many as its
    longest training row; every other model ``max_tokens``.
    """
    usual = usual_template(located)
    if template == OWN:
        chosen = [source.template or usual for source in located]
    else:
        chosen = [template] * len(located)
        others = sorted({s.template for s in located if s.template} - {template})
        if others:
            say(
                f"all models are asked in the template {template!r}; some runs were trained with "
                f"{', '.join(others)}"
            )
    return [
        Way(name, source.system, room(source, max_tokens, think_tokens))
        for name, source in zip(chosen, located, strict=True)
    ]


def usual_template(located: Sequence[Source]) -> str:
    """The template that most of the runs were trained with; the first of them where there is a tie,
    ``instruction`` without any.
    """
    known = Counter(s.template for s in located if s.template and s.template != "none")
    return known.most_common(1)[0][0] if known else "instruction"


def room(source: Source, max_tokens: int, think_tokens: int | None) -> int:
    """Longest answer of a model in tokens: a thought that its run was trained on is never cut off where
    ``think_tokens`` is null.
    """
    if source.recipe is None or "think" not in source.recipe:
        return max_tokens
    return think_tokens or int(source.recipe["data"]["max_length"])


def with_system(question: Conversation, system: str | None) -> Conversation:
    """The question after a system prompt, unless it has one or stands without a template."""
    if system is None or not question.templated or question.turns[0].role == "system":
        return question
    return replace(question, turns=(Turn("system", system), *question.turns))
