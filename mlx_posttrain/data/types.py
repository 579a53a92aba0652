"""What a row becomes on its way to a batch. Plain records; no behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

THINK, END_THINK = "<think>", "</think>"  # DeepSeek-R1's marks around a thought (DeepSeek-AI 2025)


class Turn(NamedTuple):
    """One message; ``role`` is "system", "user" or "assistant".

    ``trained`` False: an answer that is read and never imitated.
    """

    role: str
    content: str
    trained: bool = True

    def __repr__(self) -> str:
        # templates.choose draws by it: what most turns have must not change the draw
        more = "" if self.trained else ", trained=False"
        return f"Turn(role={self.role!r}, content={self.content!r}{more})"


@dataclass(frozen=True)
class Conversation:
    """Turns to imitate; the last is the assistant's (in training) or the user's (when asking).

    ``templated`` is False for ``text`` and ``prompt``/``completion`` rows, whose text is used exactly as it
    stands; True where a template puts the marks of a chat or instruction format around the turns. ``extra``
    keeps the row's other columns for checkers and reward functions. ``source``, here and in what follows, is
    the name of the row's source in a mixture.
    """

    turns: tuple[Turn, ...]
    templated: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the first preferred."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    templated: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Labelled:
    """One answer and whether it is a good one (KTO)."""

    prompt: tuple[Turn, ...]
    completion: str
    label: bool
    templated: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model is trained to produce it (``trained[0]`` never counts).

    Examples with equal ids and marks are equal and hash alike, whatever other columns they carry.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False, repr=False)

    @property
    def answer_start(self) -> int:
        """Position of the first trained token; the number of tokens where none is trained."""
        return self.trained.index(True) if True in self.trained else len(self.tokens)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt as examples whose answers are marked, the first preferred by ``margin``.

    ``prompt`` is the prompt's number, shared by all pairs of one prompt; ``row`` what the pair was made from.
    """

    chosen: Example
    rejected: Example
    prompt: int
    row: Preference
    margin: float = 0.0

    @property
    def source(self) -> str:
        """That of the row."""
        return self.row.source


@dataclass(frozen=True)
class Judged:
    """One answer as an example whose answer is marked, whether it is ``good``, and how much it ``weighs``.

    ``mismatched``: the same prompt with the answer of a row that asks something else. ``prompt`` is the
    prompt's number, shared by all its answers; ``row`` what the item was made from.
    """

    answer: Example
    mismatched: Example
    good: bool
    prompt: int
    row: Labelled
    weight: float = 1.0

    @property
    def source(self) -> str:
        """That of the row."""
        return self.row.source
