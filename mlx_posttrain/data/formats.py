"""Rows to records: a row's format is detected from its columns, or named in the recipe.

    format             columns                                            record
    alpaca             instruction, output | response, optionally input   Conversation
    messages           messages | conversations                           Conversation
    prompt_completion  prompt, completion | response                      Conversation, text kept exactly
    reasoning          question | problem | prompt,                       Conversation; the answer is
                       thinking | deepseek_reasoning | reasoning,         <think> trace </think> answer
                       answer | deepseek_solution | solution
    question_answer    question, answer                                   Conversation
    text               text                                               Conversation, text kept exactly
    preference         prompt | question | instruction, chosen, rejected  Preference
    hh                 chosen, rejected: whole dialogues                  Preference
    ranked             prompt | question | instruction,                   Preference, one or more a row:
                       completions | responses with scores                see data/ranked.py
    labelled           prompt, completion | response, label               Labelled
    prompt             prompt: a question to be answered (PPO)            Conversation without an answer
    gsm8k*             question, answer: steps, #### and the answer       Conversation, as reasoning
    chosen*            chosen, optionally prompt                          Conversation with the chosen answer
    either*            as preference                                      Conversation with one of the two
                                                                          answers, by a fair coin

Formats marked * are never detected, only named in the recipe: ``chosen`` to imitate one side of pairs,
``either`` for a policy as good and as bad as its data. ``messages`` has role and content, or ShareGPT's from
and value; an answer's thought may stand in reasoning_content, thinking or reasoning, and a message with
weight 0 is not trained. Sources: Alpaca (Taori et al. 2023), HH-RLHF (Bai et al. 2022), KTO (Ethayarajh et
al. 2024; the labelled rows), UltraFeedback (Cui et al. 2023; the ranked rows), GSM8K (Cobbe et al. 2021).

A row that lacks something (an empty answer, no common prompt) is dropped and counted. A value that shows that
the file is not what the recipe takes it for (a list instead of text) is an error with the row's number.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_posttrain.data import ranked as ranked_rows
from mlx_posttrain.data.parsers import PARSERS, PROMPT_COLUMNS, REASONING_COLUMNS, Dropped, Record, Row
from mlx_posttrain.data.sources import nearest
from mlx_posttrain.errors import UserError

# Checked in this order: chosen and rejected take precedence over all other columns, instruction over the
# prompt and text columns that many Alpaca files also have, and a trace over the question and answer around
# it. Each entry lists the required columns, with alternatives within a tuple.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (PROMPT_COLUMNS, ("chosen",), ("rejected",)),
    "hh": (("chosen",), ("rejected",)),
    "ranked": (PROMPT_COLUMNS, ranked_rows.ANSWERS),
    "alpaca": (("instruction",), ("output", "response")),
    "messages": (("messages", "conversations"),),
    "labelled": (("prompt",), ("completion", "response"), ("label",)),
    "reasoning": REASONING_COLUMNS,
    "prompt_completion": (("prompt",), ("completion", "response")),
    "question_answer": (("question",), ("answer",)),
    "text": (("text",),),
    "prompt": (("prompt",),),
    "gsm8k": (("question",), ("answer",)),
    "chosen": (("chosen",),),
    "either": (PROMPT_COLUMNS, ("chosen",), ("rejected",)),
}
_NEVER_DETECTED = ("chosen", "either", "gsm8k")
#: Keys of data.columns that formats read; other keys reach checkers and reward functions only.
COLUMNS = {name for need in FORMATS.values() for alternatives in need for name in alternatives} | {
    "input",
    "margin",
    "scores",
    "system",
}
#: A reason in what parse_rows counts that is of pairs and not of rows.
TIES = "two answers have one score"


def accepted() -> str:
    """Return one line that names every format and its columns."""
    return "; ".join(
        f"{name} ({', '.join('|'.join(alternatives) for alternatives in need)})"
        for name, need in FORMATS.items()
    )


def detect(columns: Iterable[str]) -> str:
    """Return the first format whose columns are all present.

    Raises UserError with the columns found, the formats accepted and how to rename columns.
    """
    present = list(columns)
    for name, need in FORMATS.items():
        if name not in _NEVER_DETECTED and all(
            any(c in present for c in alternatives) for alternatives in need
        ):
            return name
    raise UserError(
        f"columns {', '.join(present) or '(none)'} match no format; accepted: {accepted()}; "
        "rename with data.columns, for example {instruction: your_column, output: your_other_column}"
    )


def rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with its columns renamed by a map of {our name: the file's name}."""
    if not columns:
        return dict(row)
    theirs = {v: k for k, v in columns.items()}
    kept = {k: v for k, v in row.items() if k not in theirs}
    return kept | {ours: row.get(name) for name, ours in theirs.items()}


def fill_prompts(rows: Sequence[Row], text: str, source: str) -> list[dict[str, Any]]:
    """Return the rows with a column ``prompt``: the text, with each {column} replaced by the row's value.

    Raises UserError for a column that no row has, and for a text without columns.
    """
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", text)))
    known = list(dict.fromkeys(name for row in rows for name in row))
    unknown = next((name for name in names if name not in known), None)
    if not names or unknown is not None:
        what = "has no {column} in it" if unknown is None else f"names the column {unknown!r}"
        hint = nearest(unknown or "", known)
        raise UserError(f"data.prompt {what}{hint}; the columns of {source} are {', '.join(known)}")
    return [
        {**row, "prompt": re.sub(r"\{(\w+)\}", lambda match: str(row.get(match[1], "")), text)}  # noqa: B023
        for row in rows
    ]


def parse(row: Row, format: str, columns: Mapping[str, str] | None = None, where: str = "row") -> Record:
    """Return one row as its record.

    Raises Dropped, with the reason, for a row without an answer or prompt, and UserError, starting with
    ``where``, for a value of the wrong type.
    """
    renamed = rename(row, columns or {})
    if _check_format(format) == "ranked":
        return ranked_rows.pairs(renamed, where)[0][0]
    return PARSERS[format](renamed, where)


def parse_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str = "data",
    ranked: ranked_rows.Ranked = "best_worst",
    seed: int = 0,
) -> tuple[list[Record], Counter[str]]:
    """Return the records of ``rows`` in order, and the number of rows dropped for each reason.

    ``ranked`` and ``seed`` say which answers of a ranked row become pairs (data/ranked.py); those with equal
    scores are counted under TIES. ``format`` "auto" looks at the columns that occur in any row. Raises
    UserError for unknown columns, for a row of the wrong type (by its number, from 1), and if no row is left.
    """
    columns = columns or {}
    present = list(dict.fromkeys(name for row in rows for name in row))
    for ours, name in columns.items():
        if name not in present and ours in present and set(columns.values()) <= COLUMNS:
            right = ", ".join(f"{name}: {ours}" for ours, name in columns.items())
            raise UserError(
                f"{source}: data.columns is the wrong way round: our name comes first, {{{right}}}"
            )
        if name not in present:
            hint = f"{nearest(name, present)} (there are {', '.join(present)})"
            raise UserError(f"{source}: data.columns maps {ours} to {name!r}, which is not a column{hint}")
        near = [] if ours in COLUMNS else difflib.get_close_matches(ours, sorted(COLUMNS), n=1, cutoff=0.75)
        if near:  # a name unlike any of ours may be meant for a reward function
            raise UserError(
                f"{source}: data.columns names {ours!r}, which no format reads; did you mean {near[0]!r}?"
            )
    try:
        chosen = (
            detect(rename(dict.fromkeys(present), columns)) if format == "auto" else _check_format(format)
        )
    except UserError as e:
        raise UserError(f"{source}: {e}") from e
    renamed = rename(dict.fromkeys(present), columns)
    missing = [
        alternatives for alternatives in FORMATS[chosen] if not any(c in renamed for c in alternatives)
    ]
    if missing:
        names = ", ".join("|".join(alternatives) for alternatives in missing)
        raise UserError(
            f"{source}: format {chosen} needs the column {names}, found {', '.join(present)}; "
            "rename with data.columns"
        )
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            where = f"{source}, row {number}"
            if chosen == "ranked":
                pairs, ties = ranked_rows.pairs(rename(row, columns), where, ranked, seed)
                records += pairs
                dropped.update({TIES: ties} if ties else {})
            else:
                records.append(parse(row, chosen, columns, where))
        except Dropped as e:
            dropped[str(e)] += 1
        except RecursionError:
            raise UserError(f"{source}, row {number}: nested too deeply; leave that column out") from None
    if rows and not records:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
        raise UserError(f"{source}: none of the {len(rows)} rows can be used as {chosen} ({reasons})")
    return records, dropped


def _check_format(format: str) -> str:
    if format not in FORMATS:
        raise UserError(
            f"unknown data format {format!r}{nearest(format, list(FORMATS))} (there are auto, "
            f"{', '.join(FORMATS)})"
        )
    return format
