"""How each model of a comparison is prompted: template, system prompt, and length of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from mlx_posttrain.console import log
from mlx_posttrain.models.source import Source

OWN_TEMPLATE = "own"  # the setting by which every model keeps its own template


class PromptSettings(NamedTuple):
    """How one model is prompted: template, system prompt, longest answer in tokens."""

    template: str
    system: str | None
    max_tokens: int


def prompt_settings(
    sources: Sequence[Source],
    *,
    template: str = OWN_TEMPLATE,
    max_tokens: int,
    think_tokens: int | None = None,
) -> list[PromptSettings]:
    """The prompt settings of each model.

    template: one for all models, or ``OWN_TEMPLATE``: a run gets the one it was trained with, and a model
    that is no run the one of most runs, with the system prompt that all runs have.
    max_tokens: longest answer, except that of a run that was distilled to think, which is ``think_tokens``
    or, where that is None, its longest training row.
    """
    default, system = most_common_template(sources), common_system(sources)
    if template == OWN_TEMPLATE:
        chosen = [source.template or default for source in sources]
    else:
        chosen = [template] * len(sources)
        others = sorted({s.template for s in sources if s.template} - {template})
        if others:
            log(
                f"all models are prompted in the template {template!r}; some runs were trained with "
                f"{', '.join(others)}"
            )
    return [
        PromptSettings(
            name,
            source.system if source.recipe else system,
            max_answer_tokens(source, max_tokens, think_tokens),
        )
        for name, source in zip(chosen, sources, strict=True)
    ]


def most_common_template(sources: Sequence[Source]) -> str:
    """The template that most of the runs were trained with.

    It is the first of them where there is a tie, and ``instruction`` where no run has one.
    """
    known = Counter(s.template for s in sources if s.template and s.template != "none")
    return known.most_common(1)[0][0] if known else "instruction"


def common_system(sources: Sequence[Source]) -> str | None:
    """The system prompt that all runs were trained with, for their base; None where they differ."""
    known = {source.system for source in sources if source.recipe is not None}
    return known.pop() if len(known) == 1 else None


def max_answer_tokens(source: Source, max_tokens: int, think_tokens: int | None) -> int:
    """Longest answer of a model in tokens.

    Where ``think_tokens`` is None, a thought as long as those a run was trained on is never cut off.
    """
    if source.recipe is None or "think" not in source.recipe:
        return max_tokens
    return think_tokens or int(source.recipe["data"]["max_length"])
