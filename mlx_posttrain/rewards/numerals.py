r"""Numbers as people and LaTeX write them, read exactly and in time linear in the text."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

LONGEST_NUMBER = 10_000  # characters; a longer one has no value, because its arithmetic is not linear

# Spellings

SET, END_SET = "\u2983", "\u2984"  # the braces that LaTeX prints
_THIN = "\u2009"
_TYPOGRAPHY = str.maketrans(
    {"\u2212": "-", "\u2044": "/", "\u202f": _THIN, "\u00a0": _THIN, "\u00ba": "\u00b0"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# Commands that do not mean their name; "" for those of which only the argument counts.
_COMMANDS = {
    **dict.fromkeys(("frac", "dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg"), ""),
    **dict.fromkeys(("text", "textbf", "textit", "textrm", "textnormal", "mbox", "hbox", "operatorname"), ""),
    **dict.fromkeys(("mathrm", "mathbf", "mathit", "mathsf", "boldsymbol", "bm", "boxed", "fbox"), ""),
    **dict.fromkeys(("displaystyle", "textstyle", "limits", "rm", "bf", "!"), ""),
    **dict.fromkeys(("circ", "degree"), "°"),
    **dict.fromkeys(("le", "leq"), "≤"),
    **dict.fromkeys(("ge", "geq"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("lbrace", "{"), SET),
    **dict.fromkeys(("rbrace", "}"), END_SET),
    **dict.fromkeys((",", ";", ":", ">", " ", "thinspace"), _THIN),
    **dict.fromkeys(("(", ")", "[", "]", "\\", "\n", "quad", "qquad"), " "),
    "sqrt": "√",
    "times": "×",
    "cdot": "·",
    "pi": "π",
    "infty": "∞",
    "cup": "∪",
    "pm": "±",
    "lt": "<",
    "gt": ">",
}
_ARGUMENT = r"\s*(\{[^{}]*\}|\w)"
_GROUP = re.compile(rf"(-?)\\frac{_ARGUMENT}{_ARGUMENT}|([√^]){_ARGUMENT}")
_REPEATING = re.compile(r"(?<!\d)(\d{0,20})\.(\d{0,20})\\overline\s*\{(\d{1,20})\}")
_NESTING = 4  # of fractions, roots and exponents; deeper ones stay as they are, so that the time is linear


def plain_form(text: str) -> str:
    r"""Return the text with LaTeX and typographic characters in plain spelling: ``\dfrac{1}{2}`` is 1/2.

    Thin spaces and braced commas that separate thousands are dropped. The braces that a text with LaTeX
    commands prints are SET and END_SET, and those that only group are dropped.
    """
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda m: "^" + m[0].translate(_SUPERSCRIPTS), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(r"(?<!\\)\$([^$]*)(?<!\\)\$", r"\1", text.translate(_TYPOGRAPHY))
    latex = "\\" in text
    if latex:
        text = _REPEATING.sub(_repeating, text)
        text = re.sub(r"\\(?:([A-Za-z]+)\s*|(.))", _command, text.replace("~", _THIN), flags=re.DOTALL)
    text = re.sub(rf"(?<=\d)(?:\{{,\}}|{_THIN})(?=\d{{3}}(?!\d))", "", text)
    for _ in range(_NESTING):
        text = _GROUP.sub(_grouped, text)
    if latex:
        text = re.sub("[{}]", "", text)
    text = re.sub(r"[^\S\n]+", " ", text.replace("^°", "°")).strip()
    return re.sub(r"([=(\[,]) ?- (?=[\d.$])", r"\1-", text)


def _command(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    return _COMMANDS.get(name, f"{name} " if match[1] else name)


def _repeating(match: re.Match[str]) -> str:
    r"""Return ``0.1\overline{6}`` as 15/90: 16 - 1, over a 9 for each repeated digit and a 0 for others."""
    whole, fixed, cycle = match.groups()
    over = int(whole + fixed + cycle) - int(whole + fixed or "0")
    return f"{over}/{'9' * len(cycle)}{'0' * len(fixed)}"


def _grouped(match: re.Match[str]) -> str:
    minus, over, under, mark, operand = match.groups()
    if mark:
        return mark + _operand(operand)
    over, under = _operand(over), _operand(under)
    if re.fullmatch(r"-[\d.]+", under):
        over, under = over[1:] if over.startswith("-") else f"-{over}", under[1:]
    if minus and over.startswith("-"):
        minus, over = "+", over[1:]
    before = match.string[max(0, match.start() - 1) : match.start()]
    gap = " " if before.isdigit() and not minus else ""  # after a digit it is a mixed number
    return f"{minus}{gap}{over}/{under}"


def _operand(argument: str) -> str:
    """Return an argument without its braces, and in brackets if it is more than a number or a name."""
    inner = argument.strip("{}").strip()
    return inner if re.fullmatch(r"[-+]?[\w.,√°∞]*", inner) else f"({inner})"


def separated(text: str) -> str:
    """Return a plain form without what separates thousands: commas, or spaces if it is one number."""
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        return text.replace(" ", "")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


# Numbers

_DECIMAL = r"(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<minus>(?<![\w)\].])-)?(?:[$€£]\ ?)?
    (?: (?P<whole>\d+)\ (?P<part>\d+)/(?P<parts>\d+)(?![\d/])
      | (?<!/)(?<!/\ )(?P<over>{_DECIMAL})\ ?/\ ?(?P<under>{_DECIMAL})(?![\d/])
      | (?P<base>\d{{1,20}})\^(?P<exponent>[-+]?\d{{1,3}})(?!\d)
      | (?P<digits>{_DECIMAL})
        (?:(?P<power>e[-+]?\d{{1,3}}(?!\w))|\ ?[x×·*]\ ?10\^(?P<tens>[-+]?\d{{1,3}})(?!\d))?
    ) (?P<percent>\ ?(?:%|per\ ?cent\b))?""",
    re.IGNORECASE | re.VERBOSE,
)
# Letters that are an unknown or a constant beside a number rather than a unit.
_UNKNOWN = "[abeiknpqruvwxyzθ]"
# What makes a number a part of an expression, before and after it; and what makes it an exponent or an index.
_OPERAND_BEFORE = re.compile(
    rf"(?:√\(?|(?<![^\W\d_])(?:(?:sqrt|sin|cos|tan|log|ln|exp) ?\(?|{_UNKNOWN}/)|[π∞)\]] ?/ ?|[≤≥≠±] ?"
    r"|(?<![\w</])[^\W\d_] ?[<>]=? ?)$"
)
_OPERAND_AFTER = re.compile(rf" ?(?:[*·×] ?)?(?:[√π∞]|{_UNKNOWN}(?:\^|$))|{_UNKNOWN}(?!\w|\.\w)|\)?\^")
_INDEX = re.compile(r"(?:\^|[^\W_]_|\)_)\(?$")
_AREA = re.compile(r"(?<![^\W\d_])(?:[cdkm]?m|ft|in|yd|mi)$")  # the 2 of m2 is an exponent too
_LONGEST_BEFORE = 8  # characters that the two patterns before a number need
# What makes the whole of a reference an expression.
_EXPRESSION = re.compile(
    rf"[<>≤≥≠±∪√π∞]|(?:(?<![^\W\d_]){_UNKNOWN}|\)) ?[-+*·×/^]|[-+*·×/] ?{_UNKNOWN}(?!\w)"
)


class Number(NamedTuple):
    """A number as written: its value, whether it is in percent, its digits where e and an exponent follow."""

    value: Fraction
    percent: bool = False
    digits: int | None = None


def last_number(text: str) -> Number | None:
    r"""Return the last number of the text (GSM8K's convention), exactly, or None without one.

    A number is a decimal, a fraction, a mixed number or a power of whole numbers. A comma before three digits
    separates thousands, and a currency mark may follow the minus. A minus after a letter, a digit or a
    closing bracket is a hyphen, a subtraction or a range and not part of the number. Percent signs, units,
    their exponents and final periods do not count, and 2e3 is 2000. None also where the last number is a part
    of an expression, as in ``2\pi``, divides by zero or is longer than LONGEST_NUMBER.
    """
    matches = list(_NUMBER.finditer(separated(plain_form(text))))
    last = next((match for match in reversed(matches) if not _is_index(match)), None)
    return _read(last) if last and not _in_expression(last) else None


def only_number(text: str) -> Number | None:
    """Return the number of a text that has exactly one and is no expression, else None.

    None also where the number follows a letter, as in "CO2".
    """
    text = separated(plain_form(text))
    matches = [match for match in _NUMBER.finditer(text) if not _is_index(match)]
    if len(matches) != 1 or _in_expression(matches[0]):
        return None
    before, after = text[: matches[0].start()], text[matches[0].end() :]
    if _EXPRESSION.search(before) or _EXPRESSION.search(after) or re.search(r"[^\W\d_][-_.]?$", before[-2:]):
        return None
    return _read(matches[0])


def whole_number(text: str) -> Number | None:
    """Return the number that a plain form is, without a unit, else None."""
    match = _NUMBER.fullmatch(separated(text).removesuffix("°"))
    return _read(match) if match else None


def _is_index(match: re.Match[str]) -> bool:
    before = _before(match)
    return bool(_INDEX.search(before) or (match[0] in ("2", "3") and _AREA.search(before)))


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _LONGEST_BEFORE) : match.start()]


def _in_expression(match: re.Match[str]) -> bool:
    return bool(_OPERAND_BEFORE.search(_before(match)) or _OPERAND_AFTER.match(match.string, match.end()))


def _read(match: re.Match[str]) -> Number | None:
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    try:
        if match["digits"]:
            exponent = match["tens"] or (match["power"] or "e0")[1:]
            value = _amount(match["digits"]) * Fraction(10) ** int(exponent)
        elif match["base"]:
            value = _amount(match["base"]) ** int(match["exponent"])
        elif match["over"]:
            value = _amount(match["over"]) / _amount(match["under"])
        else:
            part = _amount(match["part"]) / _amount(match["parts"])
            value = part + _amount(match["whole"]) if part < 1 else part
    except ZeroDivisionError:
        return None
    digits = len(Decimal(match["digits"]).as_tuple().digits) if match["power"] else None
    return Number(-value if match["minus"] else value, bool(match["percent"]), digits)


def _amount(digits: str) -> Fraction:
    return Fraction(Decimal(digits))  # int() refuses thousands of digits
