"""Rows with several answers and their scores, as of UltraFeedback: to pairs.

    completions | responses   a list of answers: text, messages, or UltraFeedback's {response, overall_score}
    scores                    their scores, where the answers do not carry them

Each pair is one row of the format ``preference`` with the columns score_chosen and score_rejected, the names
that UltraFeedback's binarised form has. Equal scores make no pair. Source: Cui et al. 2023, "UltraFeedback".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

from mlx_posttrain.data.cells import Dropped, Noted, Record, Row, filled, first, number, reads
from mlx_posttrain.data.messages import EARLIER
from mlx_posttrain.data.paired import PROMPT_COLUMNS, preference
from mlx_posttrain.data.parsers import INPUTS
from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.errors import UserError

#: Which answers are paired: the best with the worst, the best with a worse one drawn by seed, or all.
Ranked = Literal["best_worst", "best_random", "all"]
ANSWERS = ("completions", "responses")
#: Pairs that one row may give: its share of what is learned is as large.
MAX_PAIRS = 10_000
SCORE_CHOSEN, SCORE_REJECTED = "score_chosen", "score_rejected"
_TEXT_KEYS = ("response", "content", "text")
_SCORE_KEYS = ("overall_score", "score", "fine-grained_score")


@reads(
    "ranked",
    PROMPT_COLUMNS,
    ANSWERS,
    may=("scores", *INPUTS, *EARLIER),
    example={
        "instruction": "What is 2 + 3?",
        "completions": [
            {"response": "5", "overall_score": 9.0},
            {"response": "A number.", "overall_score": 4.0},
        ],
    },
)
def _best(row: Row, where: str) -> Record:
    """UltraFeedback: several answers with scores, of which ``data.ranked`` makes pairs."""
    return pairs(row, where)[0][0]


def pairs(row: Row, where: str, ranked: Ranked = "best_worst", seed: int = 0) -> tuple[list[Record], int]:
    """A row's pairs, and how many that ``ranked`` asks for are none because their scores are equal.

    The draw of best_random depends on the row and the seed alone. Raises Dropped for a row without two
    answers that have a score, or without a pair, and UserError for a value of the wrong type.
    """
    name = first(row, ANSWERS)
    if name not in row:  # of rows with different columns
        raise Dropped("no list of answers")
    answers = _scored(row, name, where)
    answers.sort(key=lambda pair: -pair[1])
    if len(answers) < 2:
        raise Dropped("fewer than two answers with a score")
    best, *others = answers
    lower = [one for one in others if one[1] < best[1]]
    if ranked == "all":
        if (count := len(answers) * (len(answers) - 1) // 2) > MAX_PAIRS:
            raise UserError(
                f"{where}: {len(answers):,} answers make {count:,} pairs with data.ranked=all, and a row may "
                f"give {MAX_PAIRS:,}; take data.ranked=best_worst or best_random"
            )
        chosen = list(combinations(answers, 2))
    elif not lower:
        raise Dropped("all answers have one score")
    elif ranked == "best_worst":
        chosen = [(best, others[-1])]
    else:
        chosen = [(best, lower[stable_hash(answers, seed) % len(lower)])]
    rest = {key: value for key, value in row.items() if key not in (name, "scores")}
    read = row.read if isinstance(row, Noted) else set()
    found: list[Record] = []
    problem = Dropped("all answers have one score")
    different = [(a, b) for a, b in chosen if a[1] > b[1]]
    for (better, high), (worse, low) in different:
        pair = {"chosen": better, "rejected": worse, SCORE_CHOSEN: high, SCORE_REJECTED: low}
        try:
            found.append(preference(noted := Noted(rest | pair), where))
            read |= noted.read - pair.keys()
        except Dropped as reason:
            problem = reason
    if not found:
        raise problem
    return found, len(chosen) - len(different)


def among(rows: Sequence[Row], columns: Mapping[str, str]) -> bool:
    """Whether any row has a list of answers, under its own name or as data.columns renames it."""
    names = {*ANSWERS, *(columns[name] for name in ANSWERS if name in columns)}
    return any(names & row.keys() for row in rows)


def score_gap(extra: Mapping[str, Any]) -> float:
    """By how much a pair's chosen answer has the higher score; 0 where its row has no scores.

    Raises UserError for a score that is no number.
    """
    scores = []
    for name in (SCORE_CHOSEN, SCORE_REJECTED):
        value = extra.get(name)
        if not filled(value):
            return 0.0
        if (score := number(value)) is None:
            raise UserError(f"the column {name!r} must be a finite number, found {str(value)[:40]!r}")
        scores.append(score)
    return scores[0] - scores[1]


def _scored(row: Row, name: str, where: str) -> list[tuple[Any, float]]:
    """The answers that have text and a score, each as text or messages."""
    answers, scores = _list(row, name, where), row.get("scores")
    if scores is not None:
        scores = _list(row, "scores", where)
        if len(scores) != len(answers):
            raise UserError(
                f"{where}: {len(answers)} answers in {name!r} and {len(scores)} scores: each needs its own"
            )
    elif answers and not any(isinstance(one, Mapping) and set(_SCORE_KEYS) & one.keys() for one in answers):
        raise UserError(
            f"{where}: the answers in {name!r} have no scores: give a column 'scores' with one number for "
            f"each, or one of {', '.join(_SCORE_KEYS)} in each answer, or name another format, such as "
            "data.format=question_answer"
        )
    found = []
    for i, answer in enumerate(answers):
        score = scores[i] if scores is not None else _first(answer, _SCORE_KEYS)
        text = _first(answer, _TEXT_KEYS) if isinstance(answer, Mapping) else answer
        if not isinstance(text, str | list | None):
            raise UserError(f"{where}: answer {i + 1} in {name!r} must be text, found {type(text).__name__}")
        if not filled(score):
            continue
        if (known := number(score)) is None:
            raise UserError(f"{where}: the score of answer {i + 1} must be a finite number, found {score!r}")
        if text and (isinstance(text, list) or text.strip()):
            found.append((text, known))
    return found


def _list(row: Row, name: str, where: str) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: column {name!r} must be a list, found {type(value).__name__}")
    return value


def _first(answer: Any, keys: Sequence[str]) -> Any:
    """The value of the first key that an answer has; None without one."""
    if not isinstance(answer, Mapping):
        return None
    return next((answer[key] for key in keys if filled(answer.get(key))), None)
