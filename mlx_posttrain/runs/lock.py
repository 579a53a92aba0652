"""One writer at a time: a lock on a run directory, which ends with its process however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from mlx_posttrain.errors import UserError

NAME = ".lock"

#: Device and inode of the lock files that this process has: a run that failed may still be referred to when
#: it is resumed here.
_own: set[tuple[int, int]] = set()


class InUse(UserError):
    """Another process writes the folder."""


def hold(folder: Path) -> Callable[[], None]:
    """Lock ``folder`` for this process; returns the function that gives it back.

    Raises InUse naming the process that has it, and OSError where the lock file cannot be written.
    """
    path = folder / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        key = _key(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            if key in _own:
                return lambda: None
            raise _in_use(folder, owner) from None
        except OSError:  # a network drive without locks: better an unguarded run than none
            pass
        if _is_file(path, handle):
            break
        os.close(handle)  # whoever had it took the file away between our opening and locking it
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    _own.add(key)
    return lambda: _give_back(path, handle, key)


def check(folder: Path) -> None:
    """Raise InUse when another process writes ``folder``."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        if _key(handle) not in _own:
            raise _in_use(folder, _owner(handle)) from None
    except OSError:  # no locks there, so none is held
        pass
    finally:
        os.close(handle)


def _give_back(path: Path, handle: int, key: tuple[int, int]) -> None:
    if _is_file(path, handle):
        with contextlib.suppress(OSError):
            path.unlink()
    _own.discard(key)
    os.close(handle)


def _is_file(path: Path, handle: int) -> bool:
    """Whether the opened file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _key(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _owner(handle: int) -> str:
    return os.pread(handle, 32, 0).decode("ascii", "replace")


def _in_use(folder: Path, owner: str) -> InUse:
    return InUse(
        f"{folder} is in use by process {owner or 'unknown'}: wait until it ends, or stop it, "
        "before you start another"
    )
