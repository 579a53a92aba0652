"""Rules that decide whether a model's output is right, from the row's own columns.

A thought in ``<think>`` marks is ignored: only the text after it counts, and of that only the final answer.
Nothing here runs code or needs a model.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

from mlx_posttrain.data import tasks
from mlx_posttrain.data.types import END_THINK, THINK
from mlx_posttrain.rewards import ifeval

LONGEST_TEXT = 8  # words; a longer reference text is one of many right wordings
LONGEST_EXPRESSION = 200  # characters of a countdown answer; bounds its depth and the size of its value

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\].])-)?(?:\\?[$€£])?(?P<digits>(?:\d+(?:\.\d+)?|(?<![\w.])\.\d+)(?P<power>e[-+]?\d{1,3}(?!\w))?)",
    re.IGNORECASE,
)
_BINARY = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}
_UNARY = {ast.UAdd: Fraction.__pos__, ast.USub: Fraction.__neg__}
# Without + # - % $, which distinguish C from C++ and 5 from -5.
_MARKS = ".,;:!?\"'`()[]{}*_…\u201c\u201d\u2018\u2019\u00ab\u00bb"


# The final answer of an output


def final_answer(text: str) -> str:
    """Return the final answer of an output, stripped.

    In the text after the last ``</think>`` it is the content of the last ``<answer>...</answer>``, else the
    text after the last ``####``, else the content of the last ``\\boxed{...}`` with balanced braces, else all
    of the text. A thought that is never closed has no answer: "".
    """
    response = after_thought(text)
    if marked := _ANSWER.findall(response):
        return marked[-1].strip()
    if "####" in response:
        return response.rpartition("####")[2].strip()
    boxed = _boxed(response)
    return (response if boxed is None else boxed).strip()


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


def last_number(text: str) -> Decimal | None:
    """Return the last number of the text (GSM8K's convention), exactly, or None without one.

    A comma before three digits separates thousands, and a currency mark may follow the minus. A minus after a
    letter, a digit or a closing bracket is a hyphen, a subtraction or a range and not part of the number.
    Percent signs, units and final periods do not count, and 2e3 is 2000.
    """
    numbers = list(_NUMBER.finditer(_separated(text)))
    return _value(numbers[-1]) if numbers else None


def _separated(text: str) -> str:
    """Return the text without thousands separators, and with the typographic minus as a hyphen."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\u2212", "-"))


def _value(match: re.Match[str]) -> Decimal:
    # as floats, 10**17 and 10**17 + 1 would be equal
    return Decimal((match["minus"] or "") + match["digits"])


def _plain(text: str) -> str:
    """Return the text without case, articles, outer punctuation of words and superfluous white space."""
    words = [word.strip(_MARKS) for word in text.casefold().split()]
    kept = [word for word in words if word not in ("a", "an", "the", "")]
    return " ".join(kept or words).strip()  # a lone "A" is a choice and not an article


# Rules


def kind(row: Mapping[str, Any]) -> str | None:
    """Return the rule that ``verify`` uses: checker, ifeval, countdown, number, text, or None.

    An answer is a number if it contains exactly one that does not follow a letter (not "CO2", "3/4" or
    "1990-1995"), else a text; a reference of more than LONGEST_TEXT words has no rule. The column ``output``
    is read where ``answer`` is missing. Both are read like outputs: in a GSM8K row the text after ``####`` is
    the answer.
    """
    if isinstance(row.get("checker"), Mapping):
        return "checker"
    if any(one not in ifeval.UNJUDGED for one in _listed(row.get("instruction_id_list"))):
        return "ifeval"
    numbers = _listed(row.get("numbers"))
    if numbers and all(_is_number(one) for one in [*numbers, row.get("target")]):
        return "countdown"
    reference = _reference(row)
    if reference is None:
        return None
    return "text" if _only_number(reference) is None else "number"


def verify(row: Mapping[str, Any], text: str) -> bool | None:
    """Return whether the output is right by the row's own rule, or None for a row without one.

    The rule is the first of these that the row has:

    - ``checker``: the checker of the embedded tasks (``tasks.check``).
    - ``instruction_id_list``: IFEval; the text after the thought follows every instruction, strictly.
    - ``numbers`` and ``target``: countdown; an expression of + - * / and brackets that uses each number at
      most once, as the question demands, and equals the target exactly; ``= target`` may follow. (Pan et al.
      2025, TinyZero, ask for every number exactly once.)
    - ``answer`` or ``output`` with a number: it equals the last number of the final answer (Cobbe et al.
      2021, "Training Verifiers to Solve Math Word Problems"). Units are not compared, and 50% is not 0.5. To
      compare with a reference such as 2.20906e+07, rounded by C's %g (SVAMP, from a million up), the answer
      is rounded too.
    - ``answer`` or ``output``, a short text: it equals the whole final answer except for case, articles,
      white space and the punctuation around words (after Rajpurkar et al. 2016, "SQuAD", whose evaluation
      also drops punctuation inside words, so that 3/4 equals 34).

    Raises UserError for an unknown checker or instruction.
    """
    rule = kind(row)
    if rule == "checker":
        return tasks.check(row, text)
    if rule == "ifeval":
        return ifeval.strict(row, after_thought(text))
    if rule == "countdown":
        return _countdown(
            [Fraction(str(one)) for one in row["numbers"]], Fraction(str(row["target"])), final_answer(text)
        )
    reference = _reference(row)
    if rule is None or reference is None:
        return None
    answer = final_answer(text)
    if rule == "number":
        return _same_number(last_number(answer), reference)
    return _plain(answer) == _plain(reference)


def verifiable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that have a rule, in their order."""
    return [row for row in rows if kind(row) is not None]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reference(row: Mapping[str, Any]) -> str | None:
    """Return the reference answer as a text, or None if it is missing, blank or too long."""
    value = next((row[key] for key in ("answer", "output") if row.get(key) is not None), None)
    if _is_number(value):
        value = format(Decimal(str(value)), "f")  # 1e+20 in digits
    answer = final_answer(value) if isinstance(value, str) else str(value) if isinstance(value, bool) else ""
    return answer if _plain(answer) and len(answer.split()) <= LONGEST_TEXT else None


def _only_number(answer: str) -> re.Match[str] | None:
    text = _separated(answer)
    numbers = list(_NUMBER.finditer(text))
    return (
        numbers[0]
        if len(numbers) == 1 and not re.search(r"[^\W\d_][-_.]?$", text[: numbers[0].start()])
        else None
    )


def _same_number(number: Decimal | None, reference: str) -> bool:
    match = _only_number(reference)
    if number is None or match is None:
        return False
    right = _value(match)
    if match["power"]:
        # %g keeps six digits and drops trailing zeros
        number = Context(prec=max(6, len(right.as_tuple().digits))).plus(number)
    return number == right


def _countdown(numbers: list[Fraction], target: Fraction, answer: str) -> bool:
    """Return whether ``answer`` is only an expression over the numbers with the target as its value."""
    left, equals, right = answer.strip().removesuffix(".").partition("=")
    if len(answer) > LONGEST_EXPRESSION or not re.fullmatch(r"[0-9.+\-*/()\s]+", left):
        return False
    if equals and not re.fullmatch(r"\s*-?[0-9]+(\.[0-9]+)?\s*", right):
        return False  # before Fraction computes 1e999999999
    try:
        # in brackets, because an expression may span several lines
        tree = ast.parse(f"({left})", mode="eval").body
        used: Counter[Fraction] = Counter()
        value = _evaluate(tree, used)
        stated = Fraction(right.strip()) if equals else target
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return False
    return value == stated == target and used <= Counter(numbers)


def _evaluate(tree: ast.expr, used: Counter[Fraction]) -> Fraction:
    """Return the expression's exact value, and count its numbers in ``used``.

    Raises ValueError for anything but arithmetic.
    """
    if isinstance(tree, ast.Constant) and _is_number(tree.value):
        used[Fraction(str(tree.value))] += 1
        return Fraction(str(tree.value))
    if isinstance(tree, ast.UnaryOp) and type(tree.op) in _UNARY:
        return _UNARY[type(tree.op)](_evaluate(tree.operand, used))
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        return _BINARY[type(tree.op)](_evaluate(tree.left, used), _evaluate(tree.right, used))
    raise ValueError("not arithmetic")
