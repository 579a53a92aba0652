"""File helpers: JSON with clear errors, atomic writes, free disk space, tokenizer files."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "spiece.model",
    "*.tiktoken",
)

# Class names that only transformers 5 knows; 4.57 fails with "Tokenizer class ... does not exist".
TRANSFORMERS_5_TOKENIZERS = (
    "TokenizersBackend",
    "PythonBackend",
    "SentencePieceBackend",
    "MistralCommonBackend",
)


def parse_json(text: str, finite: bool = False) -> Any:
    """Return the value of a JSON text.

    Args:
        text: as Python writes it, which may have NaN and Infinity.
        finite: these are null.

    Raises:
        ValueError: it is no JSON (JSONDecodeError), is nested too deeply, or has a number of too many digits.
    """
    try:
        return json.loads(text, parse_constant=(lambda _: None) if finite else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("a number has too many digits") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing, is not valid JSON (with line and column), or does not hold an object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not valid JSON: it is not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def from_here(name: str | Path) -> str:
    """Return a name for a message: a path below the present folder without that folder."""
    path = Path(name)
    if path.is_absolute() and path.is_relative_to(here := Path.cwd()) and path != here:
        return str(path.relative_to(here))
    return str(name)


def home(name: str | Path) -> Path:
    """Return the path of a name, its `~` filled in: a shell leaves that of `output=~/x` to us.

    Raises:
        UserError: no user of that name, or a path that cannot be looked up (too long, or not allowed).
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError:
        raise UserError(f"{name}: this machine has no user of that name") from None
    except OSError as error:
        raise UserError(f"{str(name)[:80]}: {error.strerror}") from None
    return path


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and safe from a power cut.

    Raises:
        OSError: the data of a file could not be written (a full or failing disk).
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # some file systems cannot sync folders, and their renames need no sync
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def drive_to_disk(path: Path) -> None:
    """Empty the drive's own cache on macOS, where fsync leaves data in it.

    Elsewhere `to_disk` has emptied it already.
    """
    if sys.platform == "darwin":
        handle = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):  # not supported by network drives
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it.

    Readers see the old file or the new one, never half of one.
    """
    # The suffix stays last, because mlx appends ".safetensors" to names without it; the leading dot hides the
    # file from "model*" patterns.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write(temporary)
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, indented, keys sorted."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def human_size(size: float) -> str:
    """Return a byte count in readable decimal units: 1500000 -> '1.5 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def require_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has `needed` bytes free.

    A margin of 1 % and 1 MB is added.

    Raises:
        UserError: less is free; the message gives both sizes.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.01 + 1_000_000:
        raise UserError(
            f"not enough disk space in {existing}: {human_size(needed)} needed, {human_size(free)} free; "
            "free some or choose another folder"
        )


@contextmanager
def output_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder next to `path`, whose files move to `path` when the block succeeds.

    If it fails, nothing is left. With `force`, files of the same name are replaced, weight files of an
    earlier model are removed (loaders read every `model*.safetensors`) and other files stay.

    Raises:
        UserError: `path` is a file, or a folder that is not empty and `force` is not set, or it cannot be
            written, as on a full disk.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder to write to")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UserError(
            f"{path} exists and is not empty; choose another folder or use --force to write into it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        handle = os.open(temporary, os.O_RDONLY)
        with suppress(OSError):  # a network drive without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        yield temporary
        path.mkdir(exist_ok=True)
        new = {file.name for file in temporary.iterdir()}
        for stale in [*path.glob("model*.safetensors"), *path.glob("model*.safetensors.index.json")]:
            if stale.name not in new:
                stale.unlink()
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{path} cannot be written ({error.strerror if full else error})"
            f"{': free some space or choose another folder' if full else ''}"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary folders of `output_folder(path)` whose processes were killed.

    A process holds a lock on its own, which ends with it.
    """
    # mkdtemp adds eight characters; the second kind is of a folder that was written within such a one
    name = f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}"
    for folder in [*path.parent.glob(name), *path.parent.glob(f".{name}.{'[a-z0-9_]' * 8}")]:
        if folder.is_symlink() or not folder.is_dir():
            continue
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or on a drive without locks
            pass
        finally:
            os.close(handle)


def copy_tokenizer(src: Path, dst: Path) -> list[str]:
    """Copy a model folder's tokenizer files byte for byte and return their names.

    Two entries of tokenizer_config.json may change, where transformers 5 wrote something that 4.57 cannot
    load: a `tokenizer_class` becomes one that both know, and a list under `extra_special_tokens` (a
    dictionary in 4.57) gets the key's older name, which both read.
    """
    names = sorted({file.name for pattern in TOKENIZER_FILES for file in src.glob(pattern)})
    for name in names:
        shutil.copyfile(src / name, dst / name)
    path = dst / "tokenizer_config.json"
    if path.exists():
        config, data = read_json(path), path.read_bytes()
        # Edited as text, so that no other byte changes.
        if config.get("tokenizer_class") in TRANSFORMERS_5_TOKENIZERS:
            data = re.sub(
                rb'("tokenizer_class"\s*:\s*)"[^"]*"', rb'\1"%s"' % _portable_class(src).encode(), data
            )
        if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
            data = re.sub(rb'"extra_special_tokens"(\s*:\s*\[)', rb'"additional_special_tokens"\1', data)
        path.write_bytes(data)
    return names


def count_tokens(folder: Path) -> int | None:
    """Return one more than the largest id in a folder's tokenizer.json; None where there is no such list.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += range(len(vocab)) if isinstance(vocab, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((i + 1 for i in ids if isinstance(i, int)), default=None)


def _portable_class(src: Path) -> str:
    """Return the tokenizer class that both versions know: GPT2Tokenizer or PreTrainedTokenizerFast.

    GPT2Tokenizer is only for GPT-2's kind of tokenizer.json: it rebuilds a plain byte-level pre-tokenizer
    around the vocabulary, which would silently change any other tokenizer.
    """
    path = src / "tokenizer.json"
    if not path.exists():
        return "GPT2Tokenizer"
    tokenizer = read_json(path)
    splitter = tokenizer.get("pre_tokenizer") or {}
    byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    is_gpt2 = (
        (tokenizer.get("model") or {}).get("type") == "BPE" and byte_level and not tokenizer.get("normalizer")
    )
    return "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"
