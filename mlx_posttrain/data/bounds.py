"""What a row may be: its size, what a compressed file may unpack to, and text that has a UTF-8 form."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

#: Longest row: a tokenizer takes some hundred bytes for each token, and a row is tokenised whole.
MAX_ROW = 2_000_000
#: Bytes of a line for each of them: an escape in JSON has six, and columns have names.
MAX_LINE = 8
#: A compressed file may unpack to so many times its size (text gives 3 to 20), and to so many bytes anyway.
MAX_RATIO, MAX_UNPACKED = 100, 50_000_000
#: Bytes of JSON that is one value, which is held whole and takes several times as much as Python's objects.
MAX_WHOLE = 1_000_000_000
_PIECE = 1 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")


def too_long(where: str, size: int | None = None) -> UserError:
    """The error for a row beyond ``MAX_ROW``, of ``size`` characters where that is known."""
    what = f"{size:,}" if size else f"more than {MAX_ROW:,}"
    return UserError(f"{where}: {what} characters, and a row has at most {MAX_ROW:,}; split it into several")


def lines(path: Path, file: Any) -> Iterator[bytes]:
    """Yield the lines of a binary file, each with its newline.

    Raises UserError for one beyond ``MAX_ROW``, before the rest of it is read, and for a compressed file that
    unpacks to far too much.
    """
    number = total = 0
    most = _most(path) if isinstance(file, gzip.GzipFile) else None
    while line := file.readline(MAX_LINE * MAX_ROW + 1):
        number, total = number + 1, total + len(line)
        if len(line) > MAX_LINE * MAX_ROW:
            raise too_long(f"{path}, line {number}")
        if most is not None and total > most:
            raise _bomb(path, most)
        yield line


def whole(path: Path, file: Any) -> bytes | bytearray:
    """Return all of a binary file. Raises UserError for one beyond MAX_WHOLE, or that unpacks to too much."""
    most = min(_most(path), MAX_WHOLE) if isinstance(file, gzip.GzipFile) else MAX_WHOLE
    if os.path.getsize(path) > MAX_WHOLE:
        raise _too_large(path)
    data = bytearray()
    while piece := file.read(_PIECE):  # a read allocates as many bytes as it may give
        data += piece
        if len(data) > most:
            raise _too_large(path) if most == MAX_WHOLE else _bomb(path, most)
    return data


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path}: more than {MAX_WHOLE:,} bytes of JSON, which is read whole; give each row a line of "
        "its own, in a file named .jsonl"
    )


def _most(path: Path) -> int:
    return max(MAX_RATIO * os.path.getsize(path), MAX_UNPACKED)


def _bomb(path: Path, most: int) -> UserError:
    return UserError(
        f"{path}: unpacks to more than {most:,} bytes, which no file of rows does; if that is meant, unpack "
        "it yourself"
    )


def size(row: dict[str, Any]) -> int:
    """Return the characters of a row's columns of text."""
    return sum(len(value) for value in row.values() if isinstance(value, str))


def mended(value: Any) -> Any:
    """Return a value with U+FFFD for each half of a surrogate pair, or itself where it has none.

    JSON can name one, and UTF-8 cannot.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value) if not value.isascii() and _SURROGATE.search(value) else value
    if isinstance(value, list):
        parts = [mended(part) for part in value]
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if isinstance(value, dict):
        pairs = [(mended(key), mended(part)) for key, part in value.items()]
        changed = any(k is not key or v is not part for (k, v), (key, part) in zip(pairs, value.items()))
        return dict(pairs) if changed else value
    return value
