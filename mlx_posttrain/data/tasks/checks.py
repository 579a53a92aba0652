"""Checkers of answers, as plain data: ``{"kind": ..., ...}``.

Every kind ignores case, outer white space, a final period and a polite frame (courtesy.py), and nothing
else: an answer that hedges, repeats itself or goes on after the answer is wrong. A ``<think>`` block before
the answer is ignored.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from mlx_posttrain.data.tasks.courtesy import is_rude, unframed
from mlx_posttrain.errors import UserError

NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "x": operator.mul}
# A chain of terms, and what it is said to be: without "=" too, so that no number is begun with twice.
_EQUATION = re.compile(r"((?:-|(?<!\d))\d+)((?: [-+x] \d+)+)(?: = (-?\d+))?")
_LONGEST_INTEGER = 1000  # digits; int() refuses more than some thousands


# Specs


def one_of(*answers: str) -> dict[str, Any]:
    """Return the spec of exactly one of these texts."""
    return {"kind": "one_of", "answers": list(answers)}


def literal(text: str) -> dict[str, Any]:
    """Return the spec of this text, with its capitals and punctuation."""
    return {"kind": "literal", "text": text}


def in_order(*items: str) -> dict[str, Any]:
    """Return the spec of these items in this order, with any separators."""
    return {"kind": "in_order", "items": list(items)}


def number(value: int) -> dict[str, Any]:
    """Return the spec of this whole number, in digits or, up to twelve, as a word."""
    return {"kind": "number", "value": value}


def worked(numbers: list[int], value: int) -> dict[str, Any]:
    """Return the spec of this number, alone or after its derivation.

    The derivation is a chain of true equations that uses ``numbers`` one after another.
    """
    return {"kind": "worked", "numbers": numbers, "value": value}


def sentences(
    contains: list[str], *, most: int, least: int = 1, any_of: list[str] | None = None, ends: str = ".!?"
) -> dict[str, Any]:
    """Return the spec of complete, unrepeated sentences.

    They have ``least`` to ``most`` words, contain every phrase of ``contains`` and one of ``any_of``, and end
    with a mark of ``ends``.
    """
    return {
        "kind": "sentences",
        "contains": contains,
        "any_of": any_of or [],
        "least": least,
        "most": most,
        "ends": ends,
    }


# Checks


def _plain(text: str) -> str:
    """Return the text in lower case, with single spaces and without a final mark."""
    return re.sub(r"[.!]$", "", " ".join(text.lower().split())).strip()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _one_of(spec: Mapping[str, Any], text: str) -> bool:
    return _plain(text) in [_plain(answer) for answer in spec["answers"]]


def _literal(spec: Mapping[str, Any], text: str) -> bool:
    lines = "\n".join(line.strip() for line in text.strip().splitlines())
    straight = lines.replace("\u201c", '"').replace("\u201d", '"')
    return spec["text"] in (straight, re.sub(r"\.$", "", straight))


def _in_order(spec: Mapping[str, Any], text: str) -> bool:
    if re.search(r"[?\"()=<>/]|[.!:;](?!\s*$)|(,|-|\band)\s*$", text):
        return False  # more than a list, or a list that breaks off
    return [word for word in _words(text) if word != "and"] == _words(" ".join(spec["items"]))


def _number(spec: Mapping[str, Any], text: str) -> bool:
    plain = _plain(text)
    if plain in NUMBER_WORDS:
        return NUMBER_WORDS.index(plain) == spec["value"]
    return re.fullmatch(r"-?\d{1,9}", plain) is not None and int(plain) == spec["value"]


def _worked(spec: Mapping[str, Any], text: str) -> bool:
    steps, mark, last = text.lower().rpartition("the answer is")
    if not mark:
        return _number(spec, text)
    numbers: list[str] = []
    reached = None
    for part in filter(None, map(str.strip, re.split(r"[.,;\n]", steps))):
        equation = _EQUATION.fullmatch(part)
        if not equation or not equation[3]:
            return False
        left, result = part.split(" = ")
        terms = left.split()[::2]
        if reached is not None and terms.pop(0) != reached:
            return False
        numbers, reached = numbers + terms, result
    complete = numbers in ([], [str(n) for n in spec["numbers"]]) and reached in (None, str(spec["value"]))
    return complete and equations_hold(steps) and _number(spec, last.lstrip(": "))


def _sentences(spec: Mapping[str, Any], text: str) -> bool:
    words, plain = _words(text), " ".join(_words(text))
    parts = [" ".join(_words(part)) for part in re.split(r"[.!?]+", text) if part.strip()]

    def has(phrase: str) -> bool:
        return re.search(rf"\b{re.escape(' '.join(_words(phrase)))}\b", plain) is not None

    return (
        spec["least"] <= len(words) <= spec["most"]
        and text.strip()[-1:] in tuple(spec["ends"])
        and len(set(parts)) == len(parts)
        and re.search(r"\b(\w+) \1 \1\b", plain) is None
        and all(has(phrase) for phrase in spec["contains"])
        and (not spec["any_of"] or any(has(phrase) for phrase in spec["any_of"]))
    )


KINDS: dict[str, Callable[[Mapping[str, Any], str], bool]] = {
    "one_of": _one_of,
    "literal": _literal,
    "in_order": _in_order,
    "number": _number,
    "worked": _worked,
    "sentences": _sentences,
}


def check(row_or_spec: Mapping[str, Any], answer: str) -> bool:
    """Return whether an answer is right, without anything wrong or superfluous.

    Args:
        row_or_spec: a row of ``load``, ``preferences`` or ``reasoning``, or a checker spec alone.

    Raises:
        UserError: the spec is of no known kind.
    """
    spec = row_or_spec.get("checker", row_or_spec)
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    if kind not in KINDS:
        raise UserError(f"unknown kind of checker {kind!r}; accepted: {', '.join(KINDS)}")
    if "<think>" in answer:
        before, closed, answer = answer.rpartition("</think>")
        if not closed or before.count("<think>") != 1:
            return False
    return not is_rude(answer) and any(KINDS[kind](spec, text) for text in unframed(answer))


def equations_hold(text: str) -> bool:
    """Return whether every equation in the text, such as ``3 + 4 = 7``, is true.

    One with an integer of more than _LONGEST_INTEGER digits is not.
    """
    for left, rest, right in _EQUATION.findall(text):
        if not right:
            continue
        tokens = rest.split()
        if max(map(len, (left, right, *tokens))) > _LONGEST_INTEGER:
            return False
        total = int(left)
        for sign, value in zip(tokens[::2], tokens[1::2], strict=True):
            total = _OPERATORS[sign](total, int(value))
        if total != int(right):
            return False
    return True
