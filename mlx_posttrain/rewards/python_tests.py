"""The reward function that runs the Python a model wrote against the row's tests, if it is allowed to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import answers, sandbox
from mlx_posttrain.rewards.functions import Scores, rows


def python_tests(
    prompts: list[str],
    completions: list[str],
    tests: Sequence[Any] | None = None,
    test_list: Sequence[Any] | None = None,
    test_setup_code: Sequence[Any] | None = None,
    *,
    allow: bool = False,
    by: Literal["all", "share"] = "all",
    seconds: Annotated[float, Field(gt=0)] = 5.0,
    memory_mb: Annotated[int, Field(ge=64)] = 1024,
    workers: Annotated[int, Field(ge=1)] = 2,
) -> Scores:
    """Return 1 where the Python that the answer holds passes every test of its row, else 0.

    With ``share`` it is the share of the tests that it passes. The tests are the column ``tests``, or else
    MBPP's ``test_list`` (Austin et al. 2021): Python text, or a list of texts, each of which is one test and
    fails by raising. The code is the last fenced block after the thought, or else all of that text. None
    without tests.

    This runs what a model wrote, and so only with ``allow``: each answer in a process of its own with limits
    of ``seconds`` and ``memory_mb``, ``workers`` at a time. rewards/sandbox.py says what it is kept from.
    """
    if not allow:
        raise UserError(
            "it runs code that the model writes, in processes with limits of time, memory and files; if you "
            "want that, say so with args: {allow: true}"
        )
    if not completions:
        return []
    columns = rows(len(completions), tests=tests, test_list=test_list, test_setup_code=test_setup_code)
    limits, cancelled = sandbox.Limits(seconds=seconds, memory_mb=memory_mb), threading.Event()
    _begin(limits)

    def score(text: str, row: Mapping[str, Any]) -> float | None:
        wanted = row.get("tests") or row.get("test_list")
        if not wanted:
            return None
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        setup, code = row.get("test_setup_code") or "", _code(text)
        passed = sandbox.passed(code, wanted, setup, limits, cancelled)
        return sum(passed) / len(passed) if by == "share" else float(all(passed))

    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(score, completions, columns))
        finally:
            cancelled.set()


@functools.cache
def _begin(limits: sandbox.Limits) -> None:
    """Say what will be run. Raises UserError where not even one line runs, so that all answers would fail."""
    walls = sandbox.walls()
    log(f"python_tests: what the model writes will be run: {walls.describe()}")
    if sandbox.passed("x = 1", ["assert x == 1"], "", limits, threading.Event()) != [True]:
        raise UserError(
            f"a program of one line does not run here within {limits.seconds:g} s and {limits.memory_mb} MB: "
            f"raise seconds or memory_mb, and see whether `{' '.join(walls.command[:1])} python` starts"
        )


def _code(text: str) -> str:
    said = answers.after_thought(text)
    blocks = said.split("```")[1::2]
    return blocks[-1].partition("\n")[2] if blocks else said
