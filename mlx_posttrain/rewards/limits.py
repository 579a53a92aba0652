"""How long a reward function may take, and how an asynchronous one is awaited."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Expired(BaseException):
    """The time is up. No Exception, so that a function's own ``except Exception`` does not swallow it."""


def within(seconds: float | None, function: Callable[[], T]) -> T:
    """Return what the function returns. Raises Expired after ``seconds``, if that is not None.

    In the main thread an alarm (``signal.setitimer``) breaks the function off. Elsewhere it runs in a thread
    of its own, which is sent an exception and no longer waited for. Neither reaches into C code: a call that
    keeps Python's lock is broken off when it comes back.
    """
    if seconds is None:
        return function()
    if threading.current_thread() is threading.main_thread():
        with _alarm(seconds):
            return function()
    return _in_thread(seconds, function)


def awaited(value: Any) -> Any:
    """Return a value, or a list of values, whose awaitables have been awaited, all of a list together."""
    listed = isinstance(value, list | tuple)
    if not (inspect.isawaitable(value) or (listed and any(map(inspect.isawaitable, value)))):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_gathered(value))
    # A notebook has a loop in this thread, and a running loop cannot be entered again.
    return _in_thread(None, lambda: asyncio.run(_gathered(value)))


async def _gathered(value: Any) -> Any:
    if inspect.isawaitable(value):
        value = await value
    if not isinstance(value, list | tuple):
        return value

    async def of(one: Any) -> Any:
        return await one if inspect.isawaitable(one) else one

    return await asyncio.gather(*map(of, value))


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    armed = True

    def expire(number: int, frame: FrameType | None) -> None:
        if armed:
            raise Expired

    previous = signal.signal(signal.SIGALRM, expire)
    # again every second, for a function that goes on after any exception
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    begun = time.monotonic()
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if previous is None else previous)
        if left:  # an alarm that someone else had set
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - time.monotonic() + begun), interval)


def _in_thread(seconds: float | None, function: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            returned.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        unfinished = thread.is_alive()
        if unfinished and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(Expired)
            )
    if unfinished:
        raise Expired
    if raised:
        raise raised[0]
    return returned[0]
