"""Rules that decide whether a model's output is right, from the row's own columns.

A thought in ``<think>`` marks is ignored: only the text after it counts, and of that only the final answer
(answers.py). Nothing here runs code or needs a model.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from mlx_posttrain.data import tasks
from mlx_posttrain.rewards import answers, ifeval

LONGEST_TEXT = 8  # words; a longer reference text is one of many right wordings
LONGEST_EXPRESSION = 200  # characters of a countdown answer; bounds its depth and the size of its value

_BINARY = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}
_UNARY = {ast.UAdd: Fraction.__pos__, ast.USub: Fraction.__neg__}


def kind(row: Mapping[str, Any]) -> str | None:
    """Return the rule that ``verify`` uses: checker, ifeval, countdown, number, text, or None.

    An answer is a number if it contains exactly one, 3/4 for example, that is not a part of a name or an
    expression ("CO2", "2x", "1990-1995"), else a text. A reference of more than LONGEST_TEXT words has no
    rule, unless it is a collection of numbers. The column ``output`` is read where ``answer`` is missing.
    Both are read like outputs: in a GSM8K row the text after ``####`` is the answer.
    """
    if rule := _rule(row):
        return rule
    reference = _reference(row)
    if reference is None:
        return None
    return "number" if answers.is_number(reference) else "text"


def verify(row: Mapping[str, Any], text: str) -> bool | None:
    """Return whether the output is right by the row's own rule, or None for a row without one.

    The rule is the first of these that the row has:

    - ``checker``: the checker of the embedded tasks (``tasks.check``).
    - ``instruction_id_list``: IFEval; the text after the thought follows every instruction, strictly.
    - ``numbers`` and ``target``: countdown; an expression of + - * / and brackets that uses each number at
      most once, as the question demands, and equals the target exactly; ``= target`` may follow. (Pan et al.
      2025, TinyZero, ask for every number exactly once.)
    - ``answer`` or ``output``, a number or a short text: the final answer is the same (``answers.same``). A
      number is compared with the last number of the final answer (Cobbe et al. 2021, "Training Verifiers to
      Solve Math Word Problems").

    Raises UserError for an unknown checker or instruction.
    """
    rule = _rule(row)
    if rule == "checker":
        return tasks.check(row, text)
    if rule == "ifeval":
        return ifeval.strict(row, answers.after_thought(text))
    answer = answers.final_answer(text)
    if rule == "countdown":
        game, worked = countdown_game(row["numbers"], row["target"]), arithmetic(answer)
        return bool(game and worked and worked.used <= game[0] and worked.gives(game[1]))
    reference = _reference(row)
    return None if reference is None else answers.same(answer, reference)


def verifiable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that have a rule, in their order."""
    return [row for row in rows if kind(row) is not None]


def unjudged(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return how many rows no rule judges because their answer is too long, as a clause; "" for none.

    It says where no rule judges the others either.
    """
    rows = list(rows)
    open_ended = [row for row in rows if kind(row) is None]
    long = sum(len(_answer(row).split()) > LONGEST_TEXT for row in open_ended)
    if not long:
        return ""
    others = ", and no rule judges the others" if long < len(rows) == len(open_ended) else ""
    return (
        f"{long:,} of {len(rows):,} questions cannot be judged, because their answers are longer than "
        f"{LONGEST_TEXT} words, which no rule compares{others}"
    )


def _rule(row: Mapping[str, Any]) -> str | None:
    """Return the rule of a row that does not go by its answer, or None."""
    if isinstance(row.get("checker"), Mapping):
        return "checker"
    if any(one not in ifeval.UNJUDGED for one in _listed(row.get("instruction_id_list"))):
        return "ifeval"
    return None if countdown_game(row.get("numbers"), row.get("target")) is None else "countdown"


def countdown_game(numbers: Any, target: Any) -> tuple[Counter[Fraction], Fraction] | None:
    """Return (how often each number is given, the target), or None where one of them is missing."""
    listed = _listed(numbers)
    if not listed or not all(_is_number(one) for one in [*listed, target]):
        return None
    return Counter(Fraction(str(one)) for one in listed), Fraction(str(target))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reference(row: Mapping[str, Any]) -> str | None:
    """Return the reference answer as a text, or None if it is missing, blank or too long."""
    answer = _answer(row)
    short = len(answer.split()) <= LONGEST_TEXT or answers.is_collection(answer)
    return answer if short and answers.bare_words(answer) else None


def _answer(row: Mapping[str, Any]) -> str:
    """Return the reference answer as a text of any length, "" where it is missing."""
    value = next((row[key] for key in ("answer", "output") if row.get(key) is not None), None)
    if _is_number(value):
        value = format(Decimal(str(value)), "f")  # 1e+20 in digits
    if isinstance(value, str):
        return answers.final_answer(value)
    return str(value) if isinstance(value, bool) else ""


class Arithmetic(NamedTuple):
    """The exact value of an expression, the numbers in it, and what was said after its ``=``, if anything."""

    value: Fraction
    used: Counter[Fraction]
    stated: Fraction | None

    def gives(self, target: Fraction) -> bool:
        """Return whether the value is the target, and nothing else was said."""
        return self.value == target and self.stated in (None, target)


def arithmetic(answer: str) -> Arithmetic | None:
    """Return what an answer works out to, or None if it is anything but arithmetic.

    It may have + - * / and brackets, ``= number`` after it, and at most LONGEST_EXPRESSION characters. It is
    read by ``ast``, and nothing is run.
    """
    left, equals, right = answer.strip().removesuffix(".").partition("=")
    if len(answer) > LONGEST_EXPRESSION or not re.fullmatch(r"[0-9.+\-*/()\s]+", left):
        return None
    if equals and not re.fullmatch(r"\s*-?[0-9]+(\.[0-9]+)?\s*", right):
        return None  # before Fraction computes 1e999999999
    try:
        # in brackets, because an expression may span several lines
        tree = ast.parse(f"({left})", mode="eval").body
        used: Counter[Fraction] = Counter()
        value = _evaluate(tree, used)
        return Arithmetic(value, used, Fraction(right.strip()) if equals else None)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


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
