"""Rows to records: a row's format is detected from its columns, or named in the recipe.

The formats, their columns and an example of each stand in docs/data.md, which :func:`table` writes. Which of
several alternative columns is read is decided row by row: the first with a value. A row that lacks something
(an empty answer, no common prompt) is dropped and counted. A value that shows that the file is not what the
recipe takes it for (a list instead of text) is an error with the row's number.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_posttrain.data import bounds
from mlx_posttrain.data import ranked as ranked_rows
from mlx_posttrain.data.advice import Wants, advice, other_case
from mlx_posttrain.data.cells import FORMATS, Dropped, Noted, Record, Row, filled
from mlx_posttrain.data.messages import TOOL_CALLS, have_tools, only_asked
from mlx_posttrain.data.paired import LATER
from mlx_posttrain.data.sources import nearest
from mlx_posttrain.data.types import Conversation, Preference
from mlx_posttrain.errors import UserError

#: Formats in the order in which they are tried. chosen and rejected take precedence over all other columns,
#: instruction over the prompt and text columns that many Alpaca files also have, and a trace over the
#: question and answer around it.
ORDER = (
    "preference",
    "hh",
    "stepwise",
    "ranked",
    "alpaca",
    "messages",
    "labelled",
    "reasoning",
    "generations",
    "prompt_completion",
    "question_answer",
    "problem_solution",
    "input_output",
    "text_code",
    "role_content",
    "text",
    "prompt",
)
#: All names: those that are only ever named in a recipe come last.
NAMES = (*ORDER, *(name for name, format in FORMATS.items() if not format.detected))
#: Keys of data.columns that formats read; other keys reach checkers and reward functions only.
COLUMNS = {name for format in FORMATS.values() for name in format.columns}
#: A reason in what parse_rows counts that is of pairs and not of rows.
TIES = "two answers have one score"
#: Columns that are read outside a parser: of pairs, and by the embedded checkers and the summary.
READ_LATER = {*LATER, "checker", "family"}


@dataclass(frozen=True)
class Parsed:
    """Records in order, the rows dropped for each reason, and the columns with values that nothing read."""

    format: str
    records: list[Record]
    dropped: Counter[str]
    unread: list[str]


def table() -> list[str]:
    """The lines of a table of all formats in Markdown."""
    lines = ["| `data.format` | what a row is | needs | may have | example |", "|---|---|---|---|---|"]
    for name in NAMES:
        format = FORMATS[name]
        needs = ", ".join(" or ".join(f"`{c}`" for c in alternatives) for alternatives in format.needs)
        needed = {column for alternatives in format.needs for column in alternatives}
        may = ", ".join(f"`{column}`" for column in dict.fromkeys(format.may) if column not in needed)
        example = json.dumps(format.example, ensure_ascii=False)
        mark = "" if format.detected else " *"
        lines.append(
            f"| `{name}`{mark} | {format.description.replace('``', '`')} | {needs} | {may} | `{example}` |"
        )
    return lines


def detect(
    columns: Iterable[str],
    named: Mapping[str, str] | None = None,
    wants: Wants = "answers",
    setting: str = "data.columns",
) -> str:
    """Return the first format whose columns are all present.

    named: what the file calls those that have another name, {our name: the file's}. Raises UserError with
    the file's columns, the nearest formats, and the ``setting`` that would make them what a method ``wants``.
    """
    present = list(columns)
    for name in ORDER:
        if all(any(c in present for c in alternatives) for alternatives in FORMATS[name].needs):
            return name
    raise UserError(advice(present, named or {}, wants, setting))


def rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with its columns renamed by a map of {our name: the file's name}."""
    if not columns:
        return dict(row)
    theirs = {v: k for k, v in columns.items()}
    kept = {k: v for k, v in row.items() if k not in theirs}
    return kept | {ours: row.get(name) for name, ours in theirs.items()}


def fill_prompts(rows: Sequence[Row], text: str, source: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows with a column ``prompt``: the text, with each {column} replaced by the row's value.

    Also counts, by reason, the rows that are left out since such a value is no text, number or list of them.
    Raises UserError for a column that no row has or that has text in none, and for a text without columns.
    """
    names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", text)))
    known = list(dict.fromkeys(name for row in rows for name in row))
    unknown = next((name for name in names if name not in known), None)
    if not names or unknown is not None:
        what = "has no {column} in it" if unknown is None else f"names the column {unknown!r}"
        hint = nearest(unknown or "", known)
        raise UserError(f"data.prompt {what}{hint}; the columns of {source} are {', '.join(known)}")
    found: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        said = {name: row[name] for name in names if _is_said(row.get(name))}
        if lacks := [name for name in names if name not in said]:
            dropped[f"the column {lacks[0]!r} of data.prompt has no text"] += 1
            continue
        prompt = re.sub(r"\{(\w+)\}", lambda match: str(said[match[1]]), text)  # noqa: B023
        found.append({**row, "prompt": prompt})
    if rows and not found:
        raise UserError(f"{source}: none of the {len(rows)} rows can be used: {', '.join(dropped)}")
    return found, dropped


def _is_said(value: Any) -> bool:
    """Whether a value reads as it is written: text, a number, or a list of them."""
    if isinstance(value, list):
        return all(isinstance(part, (str, int, float)) for part in value)
    return isinstance(value, (str, int, float)) and value == value


def parse(row: Row, format: str, columns: Mapping[str, str] | None = None, where: str = "row") -> Record:
    """Return one row as its record.

    Raises Dropped, with the reason, for a row without an answer or prompt, and UserError, starting with
    ``where``, for a value of the wrong type.
    """
    return FORMATS[_check_format(format)].parse(Noted(rename(row, columns or {})), where)


def parse_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str = "data",
    ranked: ranked_rows.Ranked = "best_worst",
    seed: int = 0,
    wants: Wants = "answers",
    setting: str = "data.columns",
) -> tuple[list[Record], Counter[str]]:
    """Return the records and the counts of :func:`parse_all`."""
    parsed = parse_all(
        rows,
        format=format,
        columns=columns,
        source=source,
        ranked=ranked,
        seed=seed,
        wants=wants,
        setting=setting,
    )
    return parsed.records, parsed.dropped


def parse_all(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str = "data",
    ranked: ranked_rows.Ranked = "best_worst",
    seed: int = 0,
    wants: Wants = "answers",
    setting: str = "data.columns",
) -> Parsed:
    """Parse all rows of a source.

    ``ranked`` and ``seed`` say which answers of a ranked row become pairs (data/ranked.py); those with equal
    scores are counted under TIES. ``format`` "auto" looks at the columns with a value in any row. ``wants``
    and ``setting`` are for the advice on columns: what the rows are for, and where they are renamed. Raises
    UserError for unknown columns, for a row of the wrong type (by its number, from 1), and if no row is left.
    """
    columns = columns or {}
    present = list(dict.fromkeys(name for row in rows for name in row))
    _check_columns(columns, present, source, setting)
    columns = other_case(list(rename(dict.fromkeys(present), columns))) | dict(columns)
    renamed = rename(dict.fromkeys(present), columns)
    chosen = _format_of(rows, format, columns, source, wants, setting)
    if format == "auto" and chosen == "messages" and (name := only_asked(rows, columns)):
        chosen, columns = "prompt", {k: v for k, v in columns.items() if v != name} | {"prompt": name}
        renamed = rename(dict.fromkeys(present), columns)
    missing = [need for need in FORMATS[chosen].needs if not any(c in renamed for c in need)]
    if missing:
        names = ", ".join("|".join(alternatives) for alternatives in missing)
        raise UserError(
            f"{source}: format {chosen} needs the column {names}, found {', '.join(present)}; "
            f"rename with {setting}"
        )
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    read = {*READ_LATER}
    valued: set[str] = set()
    for number, row in enumerate(rows, 1):
        noted, where = Noted(rename(row, columns)), f"{source}, row {number}"
        try:
            if chosen == "ranked":
                pairs, ties = ranked_rows.pairs(noted, where, ranked, seed)
                records += pairs
                dropped.update({TIES: ties} if ties else {})
            else:
                records.append(FORMATS[chosen].parse(noted, where))
                _check_size(records[-1], where)
        except Dropped as e:
            dropped[TOOL_CALLS if have_tools(noted, FORMATS[chosen].columns) else str(e)] += 1
        except RecursionError:
            raise UserError(f"{where}: nested too deeply; leave that column out") from None
        read |= noted.read
        valued.update(name for name, value in noted.items() if filled(value))
    if rows and not records:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
        raise UserError(f"{source}: none of the {len(rows)} rows can be used as {chosen} ({reasons})")
    return Parsed(chosen, records, dropped, [n for n in renamed if n in valued - read])


def _check_size(record: Record, where: str) -> None:
    """Raise UserError for messages that are longer together than a row may be."""
    turns = record.turns if isinstance(record, Conversation) else record.prompt
    size = sum(len(turn.content) for turn in turns)
    if isinstance(record, Preference):
        size += max(len(record.chosen), len(record.rejected))
    if size > bounds.MAX_ROW:
        raise bounds.too_long(where, size)


def _check_columns(columns: Mapping[str, str], present: list[str], source: str, setting: str) -> None:
    """Raise UserError where the map of columns names what is not there, or misspells one of our names."""
    for ours, name in columns.items():
        same = next((other for other in columns if columns[other] == name), ours)
        if same != ours:
            raise UserError(
                f"{source}: {setting} maps both {same} and {ours} to {name!r}; a column can be read as one"
            )
        if name not in present and ours in present and set(columns.values()) <= COLUMNS:
            right = ", ".join(f"{name}: {ours}" for ours, name in columns.items())
            raise UserError(f"{source}: {setting} is the wrong way round: our name comes first, {{{right}}}")
        if name not in present:
            hint = f"{nearest(name, present)} (there are {', '.join(present)})"
            raise UserError(f"{source}: {setting} maps {ours} to {name!r}, which is not a column{hint}")
        near = [] if ours in COLUMNS else difflib.get_close_matches(ours, sorted(COLUMNS), n=1, cutoff=0.75)
        if near:  # a name unlike any of ours may be meant for a reward function
            raise UserError(
                f"{source}: {setting} names {ours!r}, which no format reads; did you mean {near[0]!r}?"
            )


def _format_of(
    rows: Sequence[Row], format: str, columns: Mapping[str, str], source: str, wants: Wants, setting: str
) -> str:
    """The format of these rows: by the columns that have a value, else by those that there are."""
    try:
        if format != "auto":
            return _check_format(format)
        names = list(dict.fromkeys(name for row in rows for name in row))
        ours = {columns.get(name, name): name for name in rename(dict.fromkeys(names), columns)}
        valued = [name for theirs, name in ours.items() if any(filled(row.get(theirs)) for row in rows)]
        try:
            return detect(valued)
        except UserError:
            present = sorted(ours.values(), key=lambda name: names.index(columns.get(name, name)))
            return detect(present, columns, wants, setting)
    except UserError as e:
        raise UserError(f"{source}: {e}") from e


def _check_format(format: str) -> str:
    if format not in FORMATS:
        raise UserError(
            f"unknown data format {format!r}{nearest(format, list(NAMES))} (there are auto, "
            f"{', '.join(NAMES)})"
        )
    return format
