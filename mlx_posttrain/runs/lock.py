"""One writer at a time: a lock on a run directory that ends with its process, however the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from mlx_posttrain.errors import UserError

NAME = ".lock"

#: Device and inode of the lock files that this process holds: a failed run may still be referenced when the
#: same process resumes it.
_held: set[tuple[int, int]] = set()


class RunInUse(UserError):
    """Another process writes the run directory."""


def acquire(folder: Path) -> Callable[[], None]:
    """Lock ``folder`` for this process and return the function that releases it.

    Where this process has the lock already, the returned function does nothing. Raises RunInUse, naming the
    process that has the lock, and OSError if the lock file cannot be written.
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
            if key in _held:
                return lambda: None
            raise _in_use(folder, owner) from None
        except OSError:  # a network drive without locks: better an unlocked run than none
            pass
        if _is_file(path, handle):
            break
        os.close(handle)  # the previous holder deleted the file between our open and our flock
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    _held.add(key)
    return lambda: _release(path, handle, key)


def check(folder: Path) -> None:
    """Raise RunInUse if another process writes ``folder``."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        if _key(handle) not in _held:
            raise _in_use(folder, _owner(handle)) from None
    except OSError:  # a drive without locks, so nothing is locked
        pass
    finally:
        os.close(handle)


def _release(path: Path, handle: int, key: tuple[int, int]) -> None:
    if _is_file(path, handle):
        with contextlib.suppress(OSError):
            path.unlink()
    _held.discard(key)
    os.close(handle)


def _is_file(path: Path, handle: int) -> bool:
    """Return whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _key(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino


def _owner(handle: int) -> str:
    return os.pread(handle, 32, 0).decode("ascii", "replace")


def _in_use(folder: Path, owner: str) -> RunInUse:
    return RunInUse(
        f"{folder} is in use by process {owner or 'unknown'}: wait until it ends, or stop it, "
        "before you start another"
    )
