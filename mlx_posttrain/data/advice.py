"""Columns of no format, or not of what a method learns from: the data.columns that mend them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mlx_posttrain.data.cells import FORMATS
from mlx_posttrain.yaml_text import flow

#: What a method makes of a row.
Wants = Literal["answers", "pairs", "prompts", "labels"]
#: Formats that are named first where columns are like none.
COMMON = ("question_answer", "messages", "alpaca", "prompt_completion", "preference", "text")
#: The formats that most files have, in place of the list of all.
USUAL = (
    "the usual columns are question and answer, instruction and output, or messages; docs/data.md lists all "
    "formats"
)
#: The format that a method's rows are advised to have.
ADVISED: dict[Wants, str] = {
    "answers": "question_answer",
    "pairs": "preference",
    "prompts": "prompt",
    "labels": "labelled",
}
#: Words in the names of other people's columns that say which of ours a column is.
ASKED = frozenset(["question", "query", "prompt", "instruction", "input", "ask", "problem", "request"])
ANSWERED = frozenset(["answer", "reply", "response", "output", "completion", "solution"])
WORDS = {
    **dict.fromkeys(("question", "query", "prompt", "instruction", "problem"), ASKED),
    **dict.fromkeys(("answer", "response", "output", "completion", "solution"), ANSWERED),
    "chosen": frozenset(["chosen", "good", "better", "best", "preferred", "winner", "accepted"]),
    "rejected": frozenset(["rejected", "bad", "worse", "worst", "other", "loser"]),
    "label": frozenset(["label", "good", "liked", "thumb"]),
}
#: Words in the names of columns that are about a text and not the text.
NO_TEXT = frozenset(["id", "count", "length", "len", "token", "time", "date", "score", "rating", "type"])
LIKE = 0.7  # from which two names are taken for one


def advice(present: Sequence[str], named: Mapping[str, str], wants: Wants, setting: str) -> str:
    """What is wrong with columns that match no format, and the ``setting`` that would make them fit.

    named: what the file calls those that have another name, {our name: the file's}.
    """
    found = ", ".join(short(named.get(name, name)) for name in present) or "(none)"
    if wants == "answers":
        near = _nearest(present)
        why = f"nearest: {', '.join(_missing(name, present) for name in near)}"
        mended = _of_format(near[0], present, named)
    else:
        why = f"this method takes {'labelled answers' if wants == 'labels' else wants}"
        mended = for_method(present, named, wants)
    return (
        f"columns {found} match no format; {why}; rename with {setting}='{flow(mended)}'; docs/data.md lists "
        "all formats"
    )


def for_method(present: Sequence[str], named: Mapping[str, str], wants: Wants) -> dict[str, str]:
    """The data.columns with which these columns are what a method needs; ``your_...`` for what is open."""
    format = FORMATS[ADVISED[wants]]
    mended = _mended(_lacks(format.name, present), present, named, format.columns)
    if wants == "pairs" and mended.get("prompt") == "your_prompt" and {*mended.values()} >= {*present}:
        del mended["prompt"]  # dialogues have it in them
    return mended


def guess(ours: str, columns: Iterable[str]) -> str | None:
    """The one of other people's columns whose name says that it is ``ours``; None without one, or of several.

    >>> guess("answer", ["ticket", "customer_question", "agent_reply"])
    'agent_reply'
    """
    found = _named_so(ours, columns)
    found = [column for column in found if ours in _words(column)] or found
    return found[0] if len(found) == 1 else None


def _named_so(ours: str, columns: Iterable[str]) -> list[str]:
    columns, wanted = list(columns), WORDS.get(ours, frozenset())
    if not any("loser" in _words(column) for column in columns):
        wanted -= {"winner"}  # by itself it says which of two answers won
    return [column for column in columns if _words(column) & wanted and not _words(column) & NO_TEXT]


def short(name: str) -> str:
    """A column's name as it is printed: at most 30 characters of one line, in quotes if it is blank."""
    words = " ".join(name.split())
    return repr(name) if not words else words if len(words) <= 30 else words[:29] + "…"


def other_case(present: Sequence[str]) -> dict[str, str]:
    """{our name: the file's name} of columns that are ours but for case and spaces, as ``Instruction``."""
    known = {name for format in FORMATS.values() for name in format.columns}
    found: dict[str, str] = {}
    for name in present:
        ours = name.strip().lower().replace(" ", "_")
        if ours in known and ours not in present:
            found.setdefault(ours, name)
    return found


def _words(name: str) -> set[str]:
    """The words of a column's name, without a plural's s: ``agentAnswer_2``, ``Agent answers``."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {word.rstrip("s") for word in re.findall(r"[a-z]+", parted)}


def _of_format(name: str, present: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    """The data.columns for the nearest format; a question and its answer where that is like none.

    A prompt with a completion is a text that goes on, and seldom what is meant.
    """
    near = len(_lacks(name, present)) < len(FORMATS[name].needs) or (name in COMMON and _score(name, present))
    if name == "prompt_completion" or not near:
        name = "question_answer"
    return _mended(_lacks(name, present), present, named, FORMATS[name].columns)


def _mended(
    lacks: Sequence[Sequence[str]], present: Sequence[str], named: Mapping[str, str], read: Iterable[str] = ()
) -> dict[str, str]:
    """{our name: the file's} with a column for each of ``lacks``, which are alternative names of one.

    A column is taken by the words in its name, by its likeness to ours, or as the only one that is left.
    """
    mended = {ours: theirs for ours, theirs in named.items() if ours not in other_case([theirs])}
    left = [column for column in present if column not in {*read, *named}]
    plain = [column for column in left if re.fullmatch(r"[\w .-]+", column)]
    for need in lacks:
        ours, texts = need[0], [column for column in plain if not _words(column) & NO_TEXT]
        like = max(texts, key=lambda column: _likeness(need, [column]), default="")
        taken = guess(ours, texts)
        if not _named_so(ours, texts) and _likeness(need, [like]):
            taken = like
        if taken is None and len(lacks) == len(left) == 1 and plain:
            taken = plain[0]
        mended[ours] = taken or ("your_column" if len(lacks) == 1 else f"your_{ours}")
        plain = [column for column in plain if column != taken]
    return mended


def _nearest(present: Sequence[str], count: int = 3) -> list[str]:
    """The formats that these columns are most like, of equally near ones those that most files have."""
    detected = [name for name, format in FORMATS.items() if format.detected and name not in COMMON]
    return sorted([*COMMON, *detected], key=lambda name: -_score(name, present))[:count]


def _score(name: str, present: Sequence[str]) -> float:
    """How like a format columns are, from 0 to 1.

    A column that the format needs counts 1 where it is there, and by the likeness of its name to another
    column. Two columns count at least where there are two: a format that needs one is no better.
    """
    needs = FORMATS[name].needs
    others = [column for column in present if not any(column in need for need in needs)]
    score = sum(1.0 if any(c in present for c in need) else _likeness(need, others) for need in needs)
    return score / max(len(needs), min(2, len(present)))


def _likeness(need: Sequence[str], others: Sequence[str]) -> float:
    """The largest likeness of a name in ``need`` to one in ``others``, 0 below LIKE."""
    ratios = (
        difflib.SequenceMatcher(None, ours, theirs.lower()).ratio() for ours in need for theirs in others
    )
    return max((ratio for ratio in ratios if ratio >= LIKE), default=0.0)


def _lacks(name: str, present: Sequence[str]) -> list[Sequence[str]]:
    """What a format needs and these columns have not: alternatives, the usual name first."""
    return [need for need in FORMATS[name].needs if not any(column in present for column in need)]


def _missing(name: str, present: Sequence[str]) -> str:
    """A format's name and the columns that it lacks."""
    return f"{name} (lacks {', '.join('|'.join(need) for need in _lacks(name, present))})"
