"""Rows of one local file: JSON, JSON lines, CSV or Parquet, compressed or not, and what it is otherwise.

The first bytes say what a file is; its extension tells JSON lines and CSV apart.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_posttrain.convert.files import parse_json
from mlx_posttrain.data import bounds
from mlx_posttrain.errors import UserError

Row = dict[str, Any]

_TEXTS = (".jsonl", ".json", ".csv", ".tsv")
EXTENSIONS = (*_TEXTS, *(f"{name}.gz" for name in _TEXTS), ".parquet")
DELIMITERS = ",;\t|"
#: What a list of rows is called in a file that says more about itself; the splits come last.
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "eval"}
_ROWS = {"data", "rows", "examples", "instances", "records", "items", "samples", *_SPLITS}
#: A list of objects that is one row.
_OF_ONE_ROW = {"messages", "conversations", "conversation", "prompt", "chosen", "rejected", "completions"}
#: What the first bytes of a file tell, and what to do.
_OTHER_KINDS = (
    (b"PK\x03\x04", "a ZIP archive (or a spreadsheet)", "unpack it, or save the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `zstd -d`"),
    (b"BZh", "compressed with bzip2", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it with `unxz`"),
    (b"ARROW1", "an Arrow file", "save it as Parquet"),
    (b"%PDF", "a PDF document", "extract its text into rows"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)


def read_all(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of several files. Raises UserError for one without rows."""
    for path in files:
        empty = True
        for row in _read(path):
            empty = False
            yield row
        if empty:
            raise UserError(f"{path}: the file has no rows; is it the right one?")


def _read(path: Path) -> Iterator[Row]:
    """Yield the rows of one file."""
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(EXTENSIONS):
        raise UserError(f"{path}: unknown extension {path.suffix!r}; accepted are {', '.join(EXTENSIONS)}")
    if not path.is_file():  # a pipe would be waited for, and a device has no end
        raise UserError(f"{path}: not a regular file; save the rows as one")
    try:
        with path.open("rb") as plain:
            head = _head(plain)
        _check_kind(path, head)
        if head.startswith(b"PAR1") or name.endswith(".parquet"):
            yield from _read_parquet(path)
            return
        packed = head.startswith(b"\x1f\x8b") or path.name.lower().endswith(".gz")
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            head = _head(file)
            _check_kind(path, head)
            start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
            whole = start.startswith((b"[", b"{\n", b"{\r"))  # one value on many lines
            if name.endswith((".csv", ".tsv")):
                yield from _read_csv(path, file)
            elif name.endswith(".jsonl") and not whole:
                yield from _read_jsonl(path, file)
            else:
                yield from _read_json(path, bounds.whole(path, file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path}: broken gzip file ({e}); download it again") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _head(file: Any) -> bytes:
    """The first bytes of a file, which is then at its beginning again."""
    data: bytes = file.read(1024)
    file.seek(0)
    return data


def _check_kind(path: Path, head: bytes) -> None:
    """Raise UserError for a file that is no data, whatever its name says."""
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a Git LFS pointer, not the data itself; run `git lfs pull` in its repository, or "
            "download the file again"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{path}: a web page, not the data itself; download the file behind the page (on the hub the "
            "address with /resolve/, not /blob/)"
        )
    for magic, kind, advice in _OTHER_KINDS:
        if head.startswith(magic):
            raise UserError(f"{path}: this is {kind}; {advice}")


def _decode(path: Path, line: int, raw: bytes | bytearray) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, line {line + raw[: e.start].count(10)}: not UTF-8 text; save the file as UTF-8"
        ) from e


def _row(value: Any, where: str) -> Row:
    """A row as an object. A list of messages is a conversation without a name."""
    if isinstance(value, list) and value and all(_is_message(part) for part in value):
        return {"messages": value}
    if not isinstance(value, dict):
        raise UserError(f'{where}: a row must be an object like {{"text": ...}}, found {_kind(value)}')
    return value


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and ({"role", "content"} <= part.keys() or {"from", "value"} <= part.keys())


def _read_jsonl(path: Path, lines: Any) -> Iterator[Row]:
    for number, raw in enumerate(bounds.lines(path, lines), 1):
        text = _decode(path, number, raw).strip()
        if not text:
            continue
        try:
            value = parse_json(text, finite=True)
        except ValueError as e:
            raise UserError(
                f"{path}, line {number}: broken JSON ({_json_error(e)}); correct or delete that line"
            ) from e
        yield _row(value, f"{path}, line {number}")


def _read_json(path: Path, raw: bytes | bytearray) -> Iterator[Row]:
    """Yield the rows of a file of JSON.

    It holds a list of objects, an object with one such list (``{"data": [...]}``), or JSON lines.
    """
    text = _decode(path, 1, raw)
    if not text.strip():
        return
    try:
        data = parse_json(text, finite=True)
    except json.JSONDecodeError as e:
        # A second value after the first: JSON lines.
        if e.msg == "Extra data":
            yield from _read_jsonl(path, io.BytesIO(raw))
            return
        raise UserError(f"{path}, line {e.lineno}: broken JSON ({_json_error(e)})") from e
    except ValueError as e:
        raise UserError(f"{path}: broken JSON ({e})") from e
    if isinstance(data, dict):
        data = _rows_in(path, data)
    if not isinstance(data, list):
        raise UserError(f"{path}: must hold a list of objects, found {_kind(data)}")
    if data and all(map(_is_message, data)):  # one conversation
        data = [data]
    for number, row in enumerate(data, 1):
        yield _row(row, f"{path}, row {number}")


def _rows_in(path: Path, data: Row) -> list[Any]:
    """The rows of a file that is one object: its one list of objects, or itself.

    Raises UserError where it holds several such lists, or a table by columns.
    """
    lists = [n for n, v in data.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    named = [name for name in lists if name in _ROWS or (len(data) == 1 and name not in _OF_ONE_ROW)]
    if len(named) == 1:
        found: list[Any] = data[named[0]]
        return found
    if len(named) > 1:
        raise UserError(
            f"{path}: several lists of rows in one file ({', '.join(named)}); save each as a file of its own "
            "in a folder, and name the folder"
        )
    numbered = all(isinstance(v, dict) and "0" in v for v in data.values())
    if len(data) > 1 and numbered:
        raise UserError(
            f"{path}: a table by columns ({', '.join(map(str, list(data)[:4]))}), as pandas writes it; save "
            "it with to_json(path, orient='records', lines=True)"
        )
    return [data]


def _json_error(e: ValueError) -> str:
    return f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "list": "a list",
        "str": "a string",
        "bool": "true/false",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _read_csv(path: Path, file: Any) -> Iterator[Row]:
    """Yield CSV rows with every value as text: types are not guessed ("007" stays "007").

    The delimiter is the one that the header has most of; lines may end in a carriage return alone.
    """
    csv.field_size_limit(bounds.MAX_ROW)  # the default of 128 KB is less than one long document
    decoded = (_decode(path, n, raw) for n, raw in enumerate(bounds.lines(path, file), 1))
    start = next(decoded, "")
    lines = _chain(start, decoded)
    if "\r" in start.rstrip("\r\n"):  # the end of a line of old Macs
        lines = (part for line in lines for part in io.StringIO(line, newline="").readlines())
        start = next(lines, "")
        lines = _chain(start, lines)
    reader = csv.DictReader(lines, strict=True, delimiter=_delimiter(start))
    try:
        _check_header(path, reader.fieldnames or [])
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more fields than the header has; is a "
                    "quote or an escape missing?"
                )
            yield row
    except csv.Error as e:
        # line_num is the end of the last sound row. An unclosed quote began in the next row, whatever line
        # the reader noticed it on.
        raise UserError(
            f"{path}, line {reader.line_num + 1}: broken CSV in the row that begins here ({e})"
        ) from e


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    return chain([first] if first else [], rest)


def _delimiter(header: str) -> str:
    """The delimiter that gives the header the most fields; a comma where none gives two."""

    def fields(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=fields)


def _check_header(path: Path, names: Any) -> None:
    """Raise UserError where two columns have one name: the second would take the first one's place."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are called {twice!r}; rename one of them")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(path, file.schema_arrow.names)
            # Few at once: a text that many rows share is stored once, and unpacked for each.
            for batch in file.iter_batches(batch_size=32):
                yield from _rows(path, batch)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file ({_first_line(e)})") from e


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rows(path: Path, batch: Any) -> list[Row]:
    """A batch's rows. Raises UserError for a value that Python cannot hold, such as a date in year 12000."""
    import pyarrow

    columns = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = values.to_pylist()
        # a time zone that is not known is a KeyError; text that is not UTF-8 a ValueError
        except (pyarrow.ArrowException, OverflowError, ValueError, KeyError) as e:
            raise UserError(
                f"{path}: the column {name!r} has a value that cannot be read ({_first_line(e)}); save "
                "the file without it, or with text in its place"
            ) from e
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
