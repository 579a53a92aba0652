"""Chat templates are programs that come with a model: transformers runs them in a sandbox, this in bounds."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mlx_posttrain.errors import UserError

#: What one conversation may take: seconds, characters of its text, and further memory in bytes (on Linux).
SECONDS, CHARACTERS, MEMORY = 2.0, 10_000_000, 2**30


class _TooLong(BaseException):
    """Raised in a thread whose template has run out of time."""


_lock = threading.Lock()
_deadlines: dict[int, float] = {}  # by thread
_watching = False


def bounded(render: Callable[[], str]) -> str:
    """Return what ``render`` returns. Raises UserError where it takes too long or makes too much."""
    try:
        text = _in_time(render)
    except (_TooLong, MemoryError):
        text = None
    if text is None or len(text) > CHARACTERS:
        raise UserError(
            f"the tokenizer's chat template takes more than {SECONDS:g} seconds, or more memory than a text "
            "needs, for one conversation: it is broken or hostile; choose another template"
        ) from None
    return text


def _in_time(render: Callable[[], str]) -> str:
    global _watching
    thread = threading.get_ident()
    with _lock:
        _deadlines[thread] = time.monotonic() + SECONDS
        if not _watching:
            threading.Thread(target=_watch, daemon=True).start()
            _watching = True
    try:
        with _less_memory():
            return render()
    finally:
        with _lock:
            late = _deadlines.pop(thread, None) is None
        if late:  # take back what was not raised yet
            _raise_in(thread, None)


def _watch() -> None:
    """Raise _TooLong in threads that are past their deadline; ends when no thread renders."""
    global _watching
    idle = 0
    while idle < 40:
        time.sleep(SECONDS / 8)
        with _lock:
            idle = 0 if _deadlines else idle + 1
            for thread in [t for t, end in _deadlines.items() if time.monotonic() > end]:
                del _deadlines[thread]
                _raise_in(thread, _TooLong)
            _watching = idle < 40


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise ``error`` in a thread as soon as it runs Python again; None takes one back."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    """Let an allocation far beyond what the process has now fail, on Linux, rather than fill the machine."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as f:
        most = int(f.read().split()[0]) * resource.getpagesize() + MEMORY
    bounds = [limit for limit in (soft, hard, most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
