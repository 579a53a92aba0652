"""A thought and the answer it leads to as one text, written as DeepSeek-R1 does (DeepSeek-AI 2025)."""

from __future__ import annotations

from mlx_posttrain.data.types import END_THINK, THINK


def with_thought(thought: str, answer: str) -> str:
    """Return the thought between its marks and the answer; marks that either has already are not doubled."""
    thought = thought.strip().removeprefix(THINK).removesuffix(END_THINK).strip()
    return f"{THINK}\n{thought}\n{END_THINK}\n{split_thought(answer)[1]}"


def split_thought(text: str) -> tuple[str, str]:
    """Return (thought, answer), the thought "" where the text does not begin with one that is closed."""
    thought, mark, answer = text.strip().removeprefix(THINK).partition(END_THINK)
    if not (mark and text.lstrip().startswith(THINK)):
        return "", text
    return thought.strip(), answer.strip()


def missing_part(content: str, text: str) -> str:
    """Return the thought or the answer of ``content`` that does not stand in ``text``; "" if both do.

    White space does not count: templates trim and indent.
    """
    written = " ".join(text.split())
    return next((part for part in split_thought(content) if " ".join(part.split()) not in written), "")
