"""Rows from wherever a recipe points: the embedded data, a local file or folder, or a Hugging Face dataset.

Local JSON, JSONL and CSV are read line by line rather than through ``datasets``: its errors do not name
lines, and it copies every file into a cache. A Hugging Face id goes through ``datasets``, so that hub
configurations and splits mean what their cards say.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import io
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

Row = dict[str, Any]

# by families, with splits held out
GENERATED = ("embedded/tasks", "embedded/preferences", "embedded/reasoning")
EMBEDDED = (*GENERATED, "embedded/qa")
EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "eval": "test",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    shuffle: bool = False,
    families: Sequence[str] | None = None,
) -> list[Row]:
    """Return the rows of one split as plain dicts, the first ``limit`` of them or ``limit`` drawn by ``seed``
    with ``shuffle``.

    ``source`` is one of ``EMBEDDED``, a local file or folder, or a Hugging Face dataset id (``config`` names
    its configuration). ``families`` names the kinds to take of data in ``GENERATED``. Raises UserError, in
    one line, for whatever is wrong with the source: file, line and remedy named.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data limit {limit}: must be at least 1 (leave it out to take every row)")
    if families and source not in GENERATED:
        raise UserError(
            f"data.families belongs to {', '.join(GENERATED)}, not to {source}; leave it out, or say "
            "data.families=null where a recipe has it"
        )
    if source.startswith("embedded/"):
        return _pick(_embedded(source, split, limit, seed, families), limit, seed, shuffle)
    if not is_hub_id(source):
        return _local(Path(source).expanduser(), split, limit, seed, shuffle)
    return _hub(source, split, config, limit, seed, shuffle)


def is_hub_id(source: str) -> bool:
    """Whether the rows of ``source`` are looked up on the hub rather than on this machine."""
    return not (source.startswith("embedded/") or Path(source).expanduser().exists() or _looks_local(source))


def nearest(name: str, names: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the name most like ``name``, or nothing."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def _pick(rows: list[Row], limit: int | None, seed: int, shuffle: bool) -> list[Row]:
    if shuffle:
        rows = random.Random(seed).sample(rows, len(rows))
    return rows[:limit]


def _looks_local(source: str) -> bool:
    """True where only a path can be meant, so that a missing file is not looked for on the hub."""
    path = source.lower()
    return (
        source.startswith((".", "~", "/", "\\"))
        or path.endswith((*EXTENSIONS, ".txt", ".tsv"))
        or not _HUB_ID.fullmatch(source)
    )


# Embedded data


def _embedded(
    source: str, split: str, limit: int | None, seed: int, families: Sequence[str] | None = None
) -> list[Row]:
    if source not in EMBEDDED:
        raise UserError(
            f"no embedded data {source!r}{nearest(source, list(EMBEDDED))} (there are {', '.join(EMBEDDED)})"
        )
    from mlx_posttrain.data import tasks

    if source == "embedded/qa":
        if split != "train":
            raise UserError(f"{source} has no split {split!r}, only 'train'")
        return list(tasks.question_answers())
    split = "valid" if SPLIT_NAMES.get(split) == "validation" else split
    if source == "embedded/tasks":
        return tasks.load(split=split, limit=limit, seed=seed, families=families)
    if source == "embedded/preferences":
        return tasks.preferences(split=split, limit=limit, seed=seed, families=families)
    return tasks.reasoning(split=split, limit=limit, seed=seed, families=families)


# Local files


def _local(path: Path, split: str, limit: int | None, seed: int, shuffle: bool) -> list[Row]:
    if not path.exists():
        raise UserError(f"{path}: no such file{_near_file(path)}")
    files = _folder_split(path, split) if path.is_dir() else [path]
    if path.is_file() and SPLIT_NAMES.get(split, split) not in ("train", _split_of(path)):
        named = _split_of(path) or "train"
        raise UserError(
            f"{path}: a file is one split, {named!r}, and has no {split!r}; name the file that "
            f"holds the {split!r} rows"
        )
    # An early stop saves reading a large file for a few rows; a shuffle has to see every row first.
    rows = list(islice(_read_all(files), None if shuffle else limit))
    return _pick(rows, limit, seed, shuffle)


def _near_file(path: Path) -> str:
    """Say what does exist near a missing path."""
    folder = path.parent
    if not folder.is_dir():
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        return f" (the folder {path.parent} does not exist either; {folder} does)"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return nearest(path.name, names) or f" in {folder}; check the name"


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name speaks of (``valid-0001.jsonl``: validation), or None."""
    words = re.split(r"[-_.\s]+", path.name.lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), None)


def _folder_split(folder: Path, split: str) -> list[Path]:
    """Return the folder's files of one split; files whose names speak of no split belong to train."""
    files = sorted(
        p
        for p in folder.iterdir()
        if p.is_file() and not p.name.startswith(".") and p.name.lower().endswith(EXTENSIONS)
    )
    if not files:
        raise UserError(f"{folder}: no data file in this folder (looked for {', '.join(EXTENSIONS)})")
    wanted = SPLIT_NAMES.get(split, split)
    chosen = [p for p in files if (_split_of(p) or "train") == wanted]
    if not chosen:
        have = sorted({_split_of(p) or "train" for p in files})
        raise UserError(f"{folder}: no split {split!r} (its file names give {', '.join(have)})")
    return chosen


def _read_all(files: list[Path]) -> Iterator[Row]:
    for path in files:
        empty = True
        for row in _read(path):
            empty = False
            yield row
        if empty:
            raise UserError(f"{path}: the file has no rows; is it the right one?")


def _read(path: Path) -> Iterator[Row]:
    """Yield the rows of one file by its extension."""
    name = path.name.lower()
    if not name.endswith(EXTENSIONS):
        raise UserError(f"{path}: unknown extension {path.suffix!r}; accepted are {', '.join(EXTENSIONS)}")
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as file:
            if name.endswith(".csv"):
                yield from _read_csv(path, file)
            elif name.endswith((".jsonl", ".jsonl.gz")):
                yield from _read_jsonl(path, file)
            else:
                yield from _read_json(path, file.read())
    except (gzip.BadGzipFile, EOFError) as e:
        raise UserError(f"{path}: broken gzip file ({e}); fetch it again") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _decode(path: Path, line: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, line {line + raw[: e.start].count(10)}: not UTF-8 text; save the file as UTF-8"
        ) from e


def _read_jsonl(path: Path, lines: Any) -> Iterator[Row]:
    for number, raw in enumerate(lines, 1):
        text = _decode(path, number, raw).strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except ValueError as e:
            raise UserError(
                f"{path}, line {number}: broken JSON ({_json_fault(e)}); correct or delete that line"
            ) from e
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, line {number}: a row must be an object like {{"text": ...}}, found {_kind(row)}'
            )
        yield row


def _read_json(path: Path, raw: bytes) -> Iterator[Row]:
    """Read a list of objects, an object that holds one such list (``{"data": [...]}``), or JSON lines under
    the name .json.
    """
    text = _decode(path, 1, raw)
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        # a second object follows the first: JSON lines
        if e.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, io.BytesIO(raw))
            return
        raise UserError(f"{path}, line {e.lineno}: broken JSON ({_json_fault(e)})") from e
    if isinstance(data, dict):
        lists = [
            v for v in data.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)
        ]
        data = lists[0] if len(lists) == 1 and len(data) == 1 else [data]
    if not isinstance(data, list):
        raise UserError(f"{path}: must hold a list of objects, found {_kind(data)}")
    for number, row in enumerate(data, 1):
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, row {number}: a row must be an object like {{"text": ...}}, found {_kind(row)}'
            )
        yield row


def _json_fault(e: ValueError) -> str:
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
    """Yield CSV rows with every value as the text that stands there: no guessing of types ("007" stays
    "007").
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KB is less than one long document
    numbered = (_decode(path, n, raw) for n, raw in enumerate(file, 1))
    reader = csv.DictReader(numbered, strict=True)
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: more fields than the header has; is a "
                    "quote or an escape missing?"
                )
            yield row
    except csv.Error as e:
        # line_num is the end of the last sound row; an unclosed quote runs on from the next, whatever line it
        # is noticed on
        raise UserError(
            f"{path}, line {reader.line_num + 1}: broken CSV in the row that begins here ({e})"
        ) from e


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file ({str(e).splitlines()[0]})") from e


# Hugging Face datasets


def _hub(
    source: str, split: str, config: str | None, limit: int | None, seed: int, shuffle: bool
) -> list[Row]:
    """Load by id: from the hub, or where there is no network from the hub cache (``hf download``) or the
    cache of ``datasets``.
    """
    import datasets

    online = _hub_is_reachable()
    try:
        with _quiet(), contextlib.nullcontext() if online else _offline():
            found = datasets.load_dataset(
                (None if online else _downloaded(source)) or source, config, split=split
            )
    except UserError:
        raise
    # every version of datasets and the hub client has its own exceptions: sort by what they say
    except Exception as e:
        raise UserError(_hub_fault(source, split, e, online)) from e
    if shuffle:
        found = found.shuffle(seed=seed)
    if limit is not None:
        found = found.select(range(min(limit, len(found))))
    if not len(found):
        raise UserError(f"dataset {source!r}, split {split!r}: no rows")
    return found.to_list()


def _hub_fault(source: str, split: str, error: Exception, online: bool) -> str:
    """Return the one line that says what went wrong with a dataset id and what to do."""
    said = " ".join(str(error).split())
    name = type(error).__name__
    remedy = (
        f"`hf download --repo-type dataset {source}` on a machine with network and copy the cache, or "
        "name a local file"
    )
    if "split" in said.lower() and isinstance(error, ValueError):
        return f"dataset {source!r}: no split {split!r} ({said})"
    if "config" in said.lower() and isinstance(error, ValueError):
        return f"dataset {source!r}: {said}"
    if not online:
        return (
            f"dataset {source!r}: no such file here, no network (or offline mode), and it is not in the "
            f"cache; run {remedy}"
        )
    if "NotFound" in name and "LocalEntry" not in name:
        return (
            f"dataset {source!r}: no such file here and no such dataset on the hub, or it is gated "
            "(then `hf auth login`); check the id"
        )
    if isinstance(error, OSError) or "Connection" in name or "Timeout" in name:
        return f"dataset {source!r}: the hub did not answer ({name}); try again, or run {remedy}"
    return f"dataset {source!r}: {name}: {said}"


def _hub_is_reachable() -> bool:
    """False in offline mode, or where the hub's name does not resolve: asking anyway costs half a minute of
    retries.
    """
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    import datasets
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():  # a proxy resolves names for us
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _downloaded(source: str) -> str | None:
    """Return the folder that ``hf download`` filled, which ``datasets`` alone does not look at when offline,
    or None.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, repo_type="dataset", local_files_only=True)
    except Exception:  # not cached, or not a valid id: load_dataset then says what is wrong
        return None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch off the progress bars of ``datasets`` unless a person is watching."""
    import datasets

    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
