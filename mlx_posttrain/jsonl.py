"""Files with one JSON object a line, which a run or a command goes on appending to.

A line ends at a newline and nowhere else: texts may hold U+2028, U+0085 and the other characters at which
``str.splitlines`` splits. Only the last line can be unfinished, when a write was cut off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.convert.files import parse_json, write_atomically
from mlx_posttrain.errors import UserError

Record = dict[str, Any]


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line for each record. Raises OSError where the file cannot be written."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("ab") as f:
        # half of a surrogate pair has no UTF-8, but an escape in JSON
        f.write(text.encode("utf-8", "backslashreplace"))


def read(path: Path) -> list[Record]:
    """Return the records of a file, none of a file that does not exist; an unfinished last line is left out.

    Raises UserError, with the line's number, for a line that holds no object.
    """
    records = []
    for number, (_, record) in enumerate(_lines(path), 1):
        if record is None:
            raise UserError(
                f"{path}, line {number}: not a JSON object; correct or delete that line, the others are sound"
            )
        records.append(record)
    return records


def keep(path: Path, wanted: Callable[[Record], bool]) -> None:
    """Take all records that are not ``wanted`` and an unfinished last line out of a file.

    The lines that stay keep their bytes. Where another line holds no object, the file as it was stays beside
    it under a name that is printed. Raises OSError where the file cannot be written.
    """
    lines = _lines(path)
    broken = [number for number, (_, record) in enumerate(lines, 1) if record is None]
    if broken:
        names = (path.with_name(f"{path.name}.damaged-{n}") for n in count(1))
        old = next(name for name in names if not name.exists())
        shutil.copyfile(path, old)
        log(f"{path}: line {broken[0]} is not a JSON object; the file as it was is kept as {old.name}")
    data = b"".join(raw + b"\n" for raw, record in lines if record is not None and wanted(record))
    if path.is_file() and data != path.read_bytes():
        write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _lines(path: Path) -> list[tuple[bytes, Record | None]]:
    """Each line with its record, None where it holds no object; without an unfinished last line."""
    *whole, last = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    lines = [(raw, _record(raw)) for raw in whole if raw.strip()]
    record = _record(last)
    return lines if record is None else [*lines, (last, record)]


def _record(raw: bytes) -> Record | None:
    try:
        value = parse_json(raw.decode("utf-8"))
    except ValueError:  # UnicodeDecodeError is one
        return None
    return value if isinstance(value, dict) else None
