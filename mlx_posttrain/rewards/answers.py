r"""The final answer of an output, and whether it is the same as a reference answer.

An answer is a number, a collection of numbers (a point, an interval, a set, a list) or a short text. Values
are exact, LaTeX is read (numerals.py), and every step takes time linear in the text. There is no algebra: an
expression such as ``2\sqrt{3}`` or ``x > 3`` is a text.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from mlx_posttrain.data.types import END_THINK, THINK
from mlx_posttrain.rewards.numerals import (
    END_SET,
    SET,
    Number,
    last_number,
    only_number,
    plain_form,
    separated,
    whole_number,
)

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


# The final answer of an output


def final_answer(text: str) -> str:
    """Return the final answer of an output, stripped.

    In the text after the last ``</think>`` it is the content of the last ``<answer>...</answer>``, else the
    text after the last ``####`` that has any, else the content of the last ``\\boxed{...}`` with balanced
    braces, else all of the text. A thought that is never closed has no answer: "".
    """
    response = after_thought(text)
    if marked := _ANSWER.findall(response):
        return marked[-1].strip()
    before, *after = re.split("#{4,}", response)
    for part in reversed(after):
        if part.strip():
            return part.strip()
    boxed = _boxed(before)
    return (before if boxed is None else boxed).strip()


def after_thought(text: str) -> str:
    """Return the text after the last thought, "" if that is never closed, or all of a text without one."""
    if text.rfind(THINK) > text.rfind(END_THINK):
        return ""
    _, closed, rest = text.rpartition(END_THINK)
    return rest.strip() if closed else text


def _boxed(text: str) -> str | None:
    # One pass, because an output can be long and full of braces. open_at: (start, is a box) of the open
    # braces; last: the box that begins last among those closed.
    open_at: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for match in re.finditer(r"(\\boxed\s*\{)|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}":
            begin, box = open_at.pop() if open_at else (0, False)
            if box and (last is None or begin > last[0]):
                last = (begin, match.start())
        elif match[1] or match[0] == "{":
            open_at.append((match.end(), bool(match[1])))
    return text[last[0] : last[1]] if last else None


# The same answer


def is_number(reference: str) -> bool:
    """Return whether answers to this reference are compared as numbers."""
    return only_number(reference) is not None and not is_collection(reference)


def is_collection(reference: str) -> bool:
    """Return whether answers to this reference are compared as points, intervals, sets or lists."""
    return _collection(plain_form(reference)) is not None


def same(answer: str, reference: str) -> bool:
    """Return whether a final answer is the reference answer.

    - A collection: the same brackets around the same items, in the same order but for a set. A list without
      brackets keeps its order, because it may be one that was to be sorted; any brackets may stand around it.
      A set may be answered with a list.
    - A reference with exactly one number: the answer's last number equals it, and the answer is not a list or
      another collection. Units are neither compared nor converted, and 50% is 50; it is also a half where the
      reference is 0.5 or 1/2, but 0.5 is not 50%. To compare with a reference such as 2.20906e+07, rounded by
      C's %g (SVAMP, from a million up), the answer is rounded too.
    - A text: the same but for case, articles, white space and the punctuation around words (after Rajpurkar
      et al. 2016, "SQuAD", whose evaluation also drops punctuation inside words, so that 3-4 equals 34). In
      mathematics white space does not count at all, nor does what stands before a last ``=``.
    """
    found, expected = plain_form(answer), plain_form(reference)
    if collection := _collection(expected):
        return _alike(_collection(found) or _collection(_last_bracketed(found)), collection)
    if number := only_number(reference):
        return _equal(last_number(answer), number) and not _collection(found)
    if bare_words(found) == bare_words(expected):
        return True
    mathematical = re.search(r"[\d√π∞^=<>±×·+*|]", expected) is not None
    shorter = found if "=" in expected else found.rpartition("=")[2]
    return mathematical and bool(_compact(expected)) and _compact(shorter) == _compact(expected)


def _equal(answer: Number | None, reference: Number) -> bool:
    if answer is None:
        return False
    value = answer.value
    if reference.digits:
        # %g keeps six digits and drops trailing zeros
        context = Context(prec=max(6, reference.digits))
        value = Fraction(context.divide(Decimal(value.numerator), Decimal(value.denominator)))
    return value == reference.value or (
        answer.percent and not reference.percent and answer.value / 100 == reference.value
    )


# Without + # - % $, which distinguish C from C++ and 5 from -5.
_MARKS = ".,;:!?\"'`()[]{}*_…\u201c\u201d\u2018\u2019\u00ab\u00bb" + SET + END_SET


def bare_words(text: str) -> str:
    """Return the text without case, articles, outer punctuation of words and superfluous white space."""
    words = [word.strip(_MARKS) for word in text.casefold().split()]
    kept = [word for word in words if word not in ("a", "an", "the", "")]
    return " ".join(kept or words).strip()  # a lone "A" is a choice and not an article


def _compact(text: str) -> str:
    return "".join(text.casefold().split()).strip(".,;:!?\"'`*$")


# Collections

_OPENING, _CLOSING = "([{" + SET, ")]}" + END_SET


class Collection(NamedTuple):
    """Items and the brackets around them: "" around a list, "∪" before a union of intervals."""

    opening: str
    items: tuple[Fraction | str | Collection, ...]
    closing: str = ""


def _collection(text: str) -> Collection | None:
    """Return the point, interval, set, list or union of intervals that a plain form is, or None.

    In brackets one item at least is a number or a constant. In a list all are numbers, perhaps of one unknown
    (``x = 1 or x = 2``).
    """
    text = text.strip().rstrip(".")
    if "∪" in text:
        parts = []
        for part in map(_collection, text.split("∪")):
            if part is None:
                return None
            parts.append(part)
        return Collection("∪", tuple(parts))
    bracketed = text[:1] in tuple(_OPENING) and text[-1:] in tuple(_CLOSING)
    inside = text[1:-1] if bracketed else text
    items = _split(inside if bracketed and ", " not in inside else separated(inside))
    if len(items) < 2:
        return None
    if bracketed:
        values = tuple(map(_item, items))
        opening, closing = text[0].replace(SET, "{"), text[-1].replace(END_SET, "}")
        known = any(isinstance(value, Fraction) or re.search("[√π∞]", value) for value in values)
        return Collection(opening, values, closing) if known or opening + closing in ("[)", "(]") else None
    named = [re.fullmatch(r"([a-z]) ?= ?(.*)", item) for item in items]
    values = tuple(_item(match[2] if match else item) for match, item in zip(named, items, strict=True))
    one_unknown = len({match[1] for match in named if match}) < 2
    return Collection("", values) if one_unknown and all(isinstance(v, Fraction) for v in values) else None


def _split(text: str) -> list[str]:
    """Return what commas, semicolons, "and" and "or" separate outside brackets, [] if those do not match."""
    items, depth, begin = [], 0, 0
    for match in re.finditer(rf"[{re.escape(_OPENING + _CLOSING)},;]|\b(?:and|or)\b", text):
        if match[0] in _OPENING or match[0] in _CLOSING:
            depth += 1 if match[0] in _OPENING else -1
            if depth < 0:
                return []
        elif depth == 0:
            items.append(text[begin : match.start()].strip())
            begin = match.end()
    return [item for item in [*items, text[begin:].strip()] if item] if depth == 0 else []


def _item(text: str) -> Fraction | str:
    number = whole_number(text)
    return number.value if number else "".join(text.casefold().split()).removeprefix("+")


def _last_bracketed(text: str) -> str:
    """Return the brackets without others inside that end a text, or ""."""
    text = text.rstrip(" .*$")
    begin = max(text.rfind(bracket) for bracket in _OPENING)
    return text[begin:] if begin >= 0 else ""


def _alike(answer: Collection | None, reference: Collection) -> bool:
    if answer is None:
        return False
    if reference.opening in ("{", "∪"):
        listed = reference.opening == "{" and not answer.opening
        return (listed or answer.opening == reference.opening) and set(answer.items) == set(reference.items)
    return answer == reference if reference.opening else answer.items == reference.items
