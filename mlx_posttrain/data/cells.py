"""The values of a row's columns, and what a format is: columns, a parser, an example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from mlx_posttrain.data.types import Conversation, Labelled, Preference
from mlx_posttrain.errors import UserError

Record = Conversation | Preference | Labelled
Row = Mapping[str, Any]
Parser = TypeVar("Parser", bound=Callable[[Row, str], Record])
#: Columns that a format needs: one of each of these alternatives.
Needs = tuple[tuple[str, ...], ...]


class Dropped(Exception):
    """A row that cannot be used although the file is sound; the message is the reason to count."""


class Noted(dict[str, Any]):
    """A row that notes which of its columns are ``read``; looking whether there is one does not count."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        if name in self:
            self.read.add(name)
        return super().get(name, default)


@dataclass(frozen=True)
class Format:
    """A shape of rows: the columns it ``needs``, those it ``may`` have, and how a row is parsed.

    The parser takes (row, where); ``where`` names the file and row in an error. It raises Dropped for a row
    that lacks something, and UserError for a value of the wrong type. ``detected`` False: only named in a
    recipe, never found by the columns.
    """

    name: str
    needs: Needs
    may: tuple[str, ...]
    example: Row
    detected: bool
    parse: Callable[[Row, str], Record]

    @property
    def description(self) -> str:
        """The first line of the parser's docstring."""
        return (self.parse.__doc__ or "").partition("\n")[0]

    @property
    def columns(self) -> set[str]:
        """Every column that the parser reads."""
        return {name for alternatives in self.needs for name in alternatives} | set(self.may)


#: Every format by its name: the modules with parsers fill it.
FORMATS: dict[str, Format] = {}


def reads(
    name: str, *needs: tuple[str, ...], example: Row, may: Iterable[str] = (), detected: bool = True
) -> Callable[[Parser], Parser]:
    """Enter a parser into ``FORMATS``; its arguments are the fields of :class:`Format`."""

    def enter(parse: Parser) -> Parser:
        FORMATS[name] = Format(name, needs, tuple(may), example, detected, parse)
        return parse

    return enter


def peek(row: Row, name: str) -> Any:
    """The value of a column, None without it; not noted as read."""
    return dict.get(row, name) if isinstance(row, dict) else row.get(name)


def filled(value: Any) -> bool:
    """Whether a value says anything: not None, NaN, blank text, or an empty list."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value == value and value != [] and value != {}


def first(row: Row, names: Iterable[str]) -> str:
    """The first of the alternative columns with a value; else the first there is, or the last name."""
    names = list(names)
    present = [name for name in names if name in row]
    return next((name for name in present if filled(peek(row, name))), (present or names[-1:])[0])


def text(row: Row, name: str, where: str) -> str:
    """A column as text.

    A number is written out (an answer in a CSV or Parquet file may well be one); a missing value is empty.
    """
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "" if value != value else str(value)
    raise UserError(f"{where}: column {name!r} must be text, found {type(value).__name__}")


def number(value: Any) -> float | None:
    """A finite number, also one that is written as text, as every value of a CSV file is; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float("" if isinstance(value, str) and "_" in value else value)
    except (ValueError, OverflowError):
        return None
    return found if isfinite(found) else None


def content(text: str) -> str:
    """The text of a turn, without outer white space (the template's task) and with \\n line ends."""
    return text.replace("\r\n", "\n").strip()


def require(text: str, reason: str) -> str:
    """``text`` itself. Raises Dropped with the reason if it is empty."""
    if not text.strip():
        raise Dropped(reason)
    return text


def extra(row: Row, *used: str) -> dict[str, Any]:
    """The row's other columns."""
    return {k: v for k, v in row.items() if k not in used}
