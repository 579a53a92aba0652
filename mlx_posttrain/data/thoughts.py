"""A thought and the answer it leads to as one text, written as DeepSeek-R1 does (DeepSeek-AI 2025)."""

from __future__ import annotations

from mlx_posttrain.data.types import END_THINK, THINK

# Marks of Sky-T1, Bespoke Stratos and OpenThoughts (2025) around an answer's two parts.
_THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")


def with_thought(thought: str, answer: str) -> str:
    """Return the thought between its marks and the answer; marks that either has already are not doubled."""
    thought = thought.strip().removeprefix(THINK).removesuffix(END_THINK).strip()
    return f"{THINK}\n{thought}\n{END_THINK}\n{split_thought(answer)[1]}"


def from_marks(text: str) -> str:
    """Return an answer with OpenThoughts' marks in the form of this module; any other text as it is.

    Where the text ends inside the thought, nothing of it is an answer.
    """
    if not text.lstrip().startswith(_THOUGHT[0]):
        return text
    thought, _, solution = text.strip().removeprefix(_THOUGHT[0]).partition(_THOUGHT[1])
    answer = without_marks(solution).strip()
    return with_thought(thought, answer) if answer else ""


def without_marks(text: str) -> str:
    """Return a text that speaks of OpenThoughts' marks with the ones that :func:`from_marks` writes."""
    if "<|" in text:
        for theirs, ours in zip((*_THOUGHT, *_SOLUTION), (THINK, END_THINK, "", ""), strict=True):
            text = text.replace(theirs, ours)
    return text


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
