"""Whether a model's output is right, by the rule that the row itself carries. Nothing here runs code or needs
a model.

A thought in ``<think>`` marks is not looked at: only what stands after it counts, and there only what the
output commits to.
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
from mlx_posttrain.data.parsers import END_THINK, THINK
from mlx_posttrain.rewards import ifeval

LONGEST_TEXT = 8  # words: a longer reference text is one way of many to say it, not the answer
LONGEST_EXPRESSION = 200  # characters of a countdown answer: bounds its depth and the size of its value

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
# without + # - % $, which tell C from C++ and 5 from -5
_MARKS = ".,;:!?\"'`()[]{}*_…\u201c\u201d\u2018\u2019\u00ab\u00bb"


# what an output says


def final_answer(text: str) -> str:
    """What an output commits to, stripped.

    Of the text after the last ``</think>`` it is the inside of the last ``<answer>...</answer>``, else what
    stands after the last ``####``, else the inside of the last ``\\boxed{...}`` with balanced braces, else
    all of it. A thought that is never closed has no answer: "".
    """
    said = after_thought(text)
    if marked := _ANSWER.findall(said):
        return marked[-1].strip()
    if "####" in said:
        return said.rpartition("####")[2].strip()
    boxed = _boxed(said)
    return (said if boxed is None else boxed).strip()


def after_thought(text: str) -> str:
    """The text after the last thought, "" where that is never closed; a text without one as it is."""
    if text.rfind(THINK) > text.rfind(END_THINK):
        return ""
    _, closed, rest = text.rpartition(END_THINK)
    return rest.strip() if closed else text


def _boxed(text: str) -> str | None:
    # One pass, as an output can be long and full of braces: of those that are open, the starts; of boxes, the
    # last one closed.
    open_at: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for found in re.finditer(r"(\\boxed\s*\{)|\\.|[{}]", text, re.DOTALL):
        if found[0] == "}":
            begin, box = open_at.pop() if open_at else (0, False)
            if box and (last is None or begin > last[0]):
                last = (begin, found.start())
        elif found[1] or found[0] == "{":
            open_at.append((found.end(), bool(found[1])))
    return text[last[0] : last[1]] if last else None


def last_number(text: str) -> Decimal | None:
    """The last number of the text (GSM8K's convention), exactly; None without one.

    A comma before three digits separates thousands, and a currency mark may follow the minus. A minus after a
    letter, a digit or a closing bracket is a hyphen, a subtraction or a range and not part of the number.
    Percent signs, units and final periods do not count, and 2e3 is 2000.
    """
    numbers = list(_NUMBER.finditer(_separated(text)))
    return _value(numbers[-1]) if numbers else None


def _separated(text: str) -> str:
    """The text without separators of thousands, and with the typographic minus as a hyphen."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("\u2212", "-"))


def _value(found: re.Match[str]) -> Decimal:
    # a float would take 10**17 and 10**17 + 1 for equal
    return Decimal((found["minus"] or "") + found["digits"])


def _plain(text: str) -> str:
    """Return the text without case, articles, outer marks of each word and surplus white space."""
    words = [word.strip(_MARKS) for word in text.casefold().split()]
    kept = [word for word in words if word not in ("a", "an", "the", "")]
    return " ".join(kept or words).strip()  # the choice "A" is no article


# whether it is right


def kind(row: Mapping[str, Any]) -> str | None:
    """Name of the rule by which ``verify`` judges: checker, ifeval, countdown, number or text; None for a row
    without any.

    An answer is a number if it holds exactly one that no letter comes before (not "CO2", "3/4" or
    "1990-1995"), else a text; a reference of more than LONGEST_TEXT words has no rule. The column ``output``
    is read where ``answer`` is missing, and both as outputs: in a GSM8K row what stands after ``####`` is the
    answer.
    """
    if isinstance(row.get("checker"), Mapping):
        return "checker"
    if any(one not in ifeval.UNJUDGED for one in _listed(row.get("instruction_id_list"))):
        return "ifeval"
    numbers = _listed(row.get("numbers"))
    if numbers and all(_is_number(one) for one in [*numbers, row.get("target")]):
        return "countdown"
    wanted = _wanted(row)
    if wanted is None:
        return None
    return "text" if _only_number(wanted) is None else "number"


def verify(row: Mapping[str, Any], text: str) -> bool | None:
    """Whether the output is right by the row's own rule; None for a row without any. The first of these that
    the row has:

    - ``checker``: the embedded tasks' (``tasks.check``).
    - ``instruction_id_list``: IFEval, every instruction followed, strict, by all that stands after the
      thought.
    - ``numbers`` and ``target``: countdown, an expression of + - * / and brackets that uses each number at
      most once, as the question
      says, and equals the target exactly; ``= target`` may follow. (Pan et al. 2025, TinyZero, ask for every
      number exactly once.)
    - ``answer`` or ``output`` with a number: equal to the last number of the final answer (Cobbe et al. 2021,
      "Training Verifiers to
      Solve Math Word Problems"). A unit is not compared, nor is 50% the same as 0.5. To a reference such as
      2.20906e+07, which C's %g has rounded (SVAMP, from a million up), the answer is rounded too.
    - ``answer`` or ``output``, a short text: equal to the whole final answer but for case, articles, white
      space and the marks around
      words (after Rajpurkar et al. 2016, "SQuAD", whose evaluation also drops the marks inside words and has
      3/4 equal 34).

    Raises UserError for a checker or instruction that is not known.
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
    wanted = _wanted(row)
    if rule is None or wanted is None:
        return None
    said = final_answer(text)
    return _same_number(last_number(said), wanted) if rule == "number" else _plain(said) == _plain(wanted)


def verifiable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have a rule, in their order."""
    return [row for row in rows if kind(row) is not None]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wanted(row: Mapping[str, Any]) -> str | None:
    """The reference answer as a text, None where it is missing, blank or too long."""
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


def _same_number(said: Decimal | None, wanted: str) -> bool:
    found = _only_number(wanted)
    if said is None or found is None:
        return False
    right = _value(found)
    if found["power"]:
        # %g keeps six digits and leaves out the last zeros
        said = Context(prec=max(6, len(right.as_tuple().digits))).plus(said)
    return said == right


def _countdown(numbers: list[Fraction], target: Fraction, said: str) -> bool:
    """Whether ``said`` is an expression over the numbers with the target as its value, and nothing else."""
    left, equals, right = said.strip().removesuffix(".").partition("=")
    if len(said) > LONGEST_EXPRESSION or not re.fullmatch(r"[0-9.+\-*/()\s]+", left):
        return False
    if equals and not re.fullmatch(r"\s*-?[0-9]+(\.[0-9]+)?\s*", right):
        return False  # before Fraction works out 1e999999999
    try:
        # brackets, as an expression may go over several lines
        tree = ast.parse(f"({left})", mode="eval").body
        used: Counter[Fraction] = Counter()
        value = _evaluate(tree, used)
        stated = Fraction(right.strip()) if equals else target
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return False
    return value == stated == target and used <= Counter(numbers)


def _evaluate(tree: ast.expr, used: Counter[Fraction]) -> Fraction:
    """The expression's exact value, and in ``used`` how often each number stands in it. Raises ValueError for
    whatever is no arithmetic.
    """
    if isinstance(tree, ast.Constant) and _is_number(tree.value):
        used[Fraction(str(tree.value))] += 1
        return Fraction(str(tree.value))
    if isinstance(tree, ast.UnaryOp) and type(tree.op) in _UNARY:
        return _UNARY[type(tree.op)](_evaluate(tree.operand, used))
    if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
        return _BINARY[type(tree.op)](_evaluate(tree.left, used), _evaluate(tree.right, used))
    raise ValueError("no arithmetic")
