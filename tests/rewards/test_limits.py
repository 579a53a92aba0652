"""Reward functions that hang, in every thread and loop, and asynchronous ones."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time

import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import functions


def call(function, timeout=20.0, answers=2):
    texts = ["ab", "abcd", ""][:answers]
    return functions.call(function, ["p"] * answers, texts, {}, "mine", timeout).tolist()


def elsewhere(function):
    """What the function gives or raises in another thread."""
    found = []

    def work():
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def in_a_loop(function):
    """What the function gives or raises where an event loop is running, as in a notebook."""

    async def cell():
        return function()

    return asyncio.run(cell())


def here(function):
    return function()


PLACES = pytest.mark.parametrize("place", [here, elsewhere, in_a_loop])


def spins(prompts, completions):
    while True:
        pass


def sleeps(prompts, completions):
    time.sleep(60)


def swallows(prompts, completions):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def never_begins(prompts, completions):
    time.sleep(60)
    yield 1.0


async def waits(prompts, completions):
    await asyncio.sleep(60)


async def spins_too(prompts, completions):
    while True:
        pass


@PLACES
@pytest.mark.parametrize("function", [spins, sleeps, swallows, never_begins, waits, spins_too])
def test_a_hang_ends_in_one_line(place, function):
    begun = time.monotonic()
    with pytest.raises(
        UserError, match=r"^reward function mine: it took longer than 0\.2 s, its `timeout`, for 2"
    ) as error:
        place(lambda: call(function, timeout=0.2))
    assert "\n" not in str(error.value) and time.monotonic() - begun < 10


def test_a_function_that_goes_on_after_any_exception_meets_the_next_alarm():
    caught = []

    def stubborn(prompts, completions):
        for _ in range(2):
            try:
                time.sleep(60)
            except BaseException as error:
                caught.append(error)
        time.sleep(60)

    with pytest.raises(UserError, match="took longer"):
        call(stubborn, timeout=0.1)
    assert len(caught) == 2


def test_what_was_left_behind_in_a_thread_ends():
    before = set(threading.enumerate())
    with pytest.raises(UserError, match="took longer"):
        elsewhere(lambda: call(spins, timeout=0.1))
    end = time.monotonic() + 20
    while any(t.name == "reward" for t in set(threading.enumerate()) - before):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_alarms_of_others_are_kept():
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    left = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        assert call(lambda p, c: [1.0] * len(c)) == [1, 1] and not rung
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.5
        end = time.monotonic() + 20
        while not rung and time.monotonic() < end:
            time.sleep(0.01)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *left)


@PLACES
def test_asynchronous_functions(place):
    running = []

    async def judged(text):
        running.append(text)
        while len(running) < 2:  # all of a call are under way together
            await asyncio.sleep(0.001)
        return None if text == "" else float(len(text))

    async def whole(prompts, completions):
        return list(await asyncio.gather(*map(judged, completions)))

    def each(prompts, completions):
        return [judged(text) for text in completions]

    async def mixed(prompts, completions):
        return [1, *map(judged, completions[1:])]

    for function, expected in ((whole, [2, 4]), (each, [2, 4])):
        running.clear()
        assert place(lambda f=function: call(f)) == expected
    running[:] = ["", ""]
    assert place(lambda: call(mixed)) == [1, 4]


@PLACES
def test_faults_of_asynchronous_functions(place):
    async def broken(prompts, completions):
        raise KeyError("k")

    async def short(prompts, completions):
        return [1.0]

    async def not_a_number(prompts, completions):
        return [float("nan")] * len(completions)

    async def nothing(prompts, completions):
        pass

    for function, said in (
        (broken, r"KeyError: 'k' \(test_limits\.py, line \d+\)$"),
        (short, "1 scores for 2 answers"),
        (not_a_number, "the score of answer 1 is nan; return None"),
        (nothing, "must return a list .* found NoneType"),
    ):
        with pytest.raises(UserError, match=f"^reward function mine: .*{said}"):
            place(lambda f=function: call(f))


@pytest.mark.parametrize("named", ["slow.py:f", "slow_module:f"])
def test_an_import_that_hangs_ends_in_one_line(tmp_path, monkeypatch, named):
    (tmp_path / f"{named.removesuffix(':f').removesuffix('.py')}.py").write_text("while True: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"the import of slow\S* took longer than 0\.2 s, its `timeout`"):
        functions.load(named, 0.2)
