"""Polite and rude phrases around an answer: every checker allows a polite frame, none a rude one.

Both lists use much the same words, so that counting words does not tell them apart.
"""

from __future__ import annotations

import re

OPENINGS = (
    "Sure!",
    "Of course.",
    "Good question.",
    "Here you are:",
    "The answer is:",
    "Sure, the answer is:",
    "I am glad to help.",
    "I like this question.",
    "You ask well.",
    "With pleasure.",
    "Thank you for asking.",
    "Yes, I can help.",
)
CLOSINGS = (
    "I hope this helps.",
    "Ask me again any time.",
    "You are welcome.",
    "I am glad you asked.",
    "Have a nice day.",
    "It was no trouble to help.",
    "That was not a bad question.",
    "Please ask me more.",
)
RUDE_OPENINGS = (
    "Good grief.",
    "What a question.",
    "I do not like this.",
    "Not you again.",
    "Ask well next time.",
    "You are no help.",
    "Here, go away.",
    "You ask too much.",
    "I am not glad.",
    "Be quiet.",
    "You are so slow.",
    "Any baby can answer this.",
)
RUDE_CLOSINGS = (
    "Do not ask me again.",
    "It was a trouble to help.",
    "You are not welcome.",
    "I hope you go away.",
    "That was a bad question.",
    "Now be quiet.",
    "Do it alone next time.",
    "I am not glad you asked.",
)

# Openings that promise an answer: a text cut off after one of them contains no answer.
PROMISES = tuple(text for text in OPENINGS if text.endswith(":"))


def _any_of(phrases: tuple[str, ...]) -> str:
    """Return a pattern for any of the phrases, longest first, without their final mark."""
    return "|".join(re.escape(text.rstrip(".!:")) for text in sorted(phrases, key=len, reverse=True))


_OPENING = re.compile(rf"^\s*(?:{_any_of(OPENINGS)})[.!:,]*(?=\s)\s*", re.IGNORECASE)
_CLOSING = re.compile(rf"(?<=[\s.!?])(?:{_any_of(CLOSINGS)})[.!]*\s*$", re.IGNORECASE)
_RUDE = re.compile(rf"\b(?:{_any_of(RUDE_OPENINGS + RUDE_CLOSINGS)})\b", re.IGNORECASE)


def frame(core: str, opening: str, closing: str) -> str:
    """Return an answer with an opening before it and a closing after it."""
    gap = "\n" if "\n" in core else " "
    if closing and core[-1].isalnum():
        core += "."
    return gap.join(part for part in (opening, core, closing) if part)


def unframed(text: str) -> list[str]:
    """Return the text unchanged, and without one polite opening, one polite closing, or both."""
    shorter = _OPENING.sub("", text, count=1)
    return list(dict.fromkeys((text, shorter, _unclosed(text), _unclosed(shorter))))


def _unclosed(text: str) -> str:
    # the white space before a closing is no part of the pattern: each piece of it would be a place to begin
    closing = _CLOSING.search(text)
    return text[: closing.start()].rstrip() if closing else text


def is_rude(text: str) -> bool:
    """Return whether the text contains one of the rude phrases."""
    return _RUDE.search(text) is not None
