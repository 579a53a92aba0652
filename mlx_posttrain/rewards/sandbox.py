"""Code that a model wrote, run against tests in a process of its own, with limits.

| what         | how                                                                    | where        |
|--------------|------------------------------------------------------------------------|--------------|
| time         | wall clock, and RLIMIT_CPU                                             | everywhere   |
| memory       | watched through psutil or ``ps``; RLIMIT_AS, which macOS does not hold | everywhere   |
| processes    | watched, and RLIMIT_NPROC; all are killed at the end                   | everywhere   |
| file size    | RLIMIT_FSIZE                                                           | everywhere   |
| other files  | cannot be changed: Landlock, or sandbox-exec                           | if it is there |
| network      | none: ``unshare``, or sandbox-exec                                     | if it is there |

Files can be read. The environment is empty but for a few settings of ours. This keeps the accidents of a
policy in training from doing harm; it is no wall against an attacker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_posttrain.rewards.sandbox_child import landlock_version

POLL = 0.05  # seconds between two looks at a process
CHILD = Path(__file__).with_name("sandbox_child.py")
#: macOS counts address space that is merely reserved, and does not hold RLIMIT_AS.
ADDRESS_SPACE_BINDS = sys.platform != "darwin"
_UNSHARE = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_SANDBOX_EXEC = ("sandbox-exec", "-p")
# The later rule wins. Python itself needs to write to no file.
_PROFILE = """(version 1)
(allow default)
(deny network*)
(deny process-fork)
(deny signal) (allow signal (target self))
(deny file-write*) (allow file-write* (subpath {folder}) (literal "/dev/null"))
"""


@dataclass(frozen=True)
class Limits:
    """Of one run: wall-clock seconds, megabytes of memory and of any one file, processes and threads."""

    seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 16
    processes: int = 16


@dataclass(frozen=True)
class Walls:
    """What this system offers: the command that a run starts with, and whether Landlock is there."""

    command: tuple[str, ...]
    landlock: bool

    def describe(self) -> str:
        """Return in one line what a run cannot do here, and what it can."""
        tool = self.command[0] if self.command else None
        protector = "Landlock" if self.landlock else tool if self.command == _SANDBOX_EXEC else None
        network = (
            f"no network ({tool})" if tool else "the NETWORK IS OPEN to it, for want of a way to close it"
        )
        files = "files outside its own folder "
        files += f"stay as they are ({protector})" if protector else "ARE OPEN to it, for want of a guard"
        return f"{network}; {files}"


@functools.cache
def walls() -> Walls:
    """Return what this system offers, found out by trying."""

    def works(*command: str) -> bool:
        if shutil.which(command[0], path=os.defpath) is None:
            return False
        try:
            return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    if sys.platform == "darwin":
        profile = _PROFILE.format(folder='"/private/tmp"')
        there = works(*_SANDBOX_EXEC, profile, "/usr/bin/true")
        return Walls(_SANDBOX_EXEC if there else (), False)
    return Walls(_UNSHARE if works(*_UNSHARE, "true") else (), landlock_version() > 0)


def passed(
    code: str, tests: Sequence[str], setup: str, limits: Limits, cancelled: threading.Event
) -> list[bool]:
    """Return for each test whether it passed, after ``setup`` and ``code`` have run.

    All fail that come after a limit was met, or once ``cancelled`` is set.
    """
    around, secret = walls(), secrets.token_hex(16)
    resources = {
        "CPU": math.ceil(limits.seconds) + 1,
        "FSIZE": limits.file_mb << 20,
        "NPROC": limits.processes,
        "NOFILE": 64,
        "CORE": 0,
    }
    if ADDRESS_SPACE_BINDS:
        resources["AS"] = limits.memory_mb << 20
    request = {
        "code": code,
        "tests": list(tests),
        "setup": setup,
        "limits": resources,
        "landlock": around.landlock,
        "secret": secret,
    }
    # Files and no pipes: nobody waits for a reader or a writer that is gone.
    with (
        tempfile.TemporaryDirectory(prefix="mlx-posttrain-tests-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+") as asked,
        tempfile.TemporaryFile("w+b") as reported,
    ):
        json.dump(request, asked)
        asked.seek(0)
        process = subprocess.Popen(
            [*_around(around, folder), sys.executable, "-I", "-B", str(CHILD)],
            stdin=asked,
            stdout=reported,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={
                "PATH": os.defpath,
                "HOME": folder,
                "TMPDIR": folder,
                "PYTHONHASHSEED": "0",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,
        )
        try:
            _watch(process, limits, cancelled)
        finally:
            _kill(process)
        reported.seek(0)
        lines = reported.read().decode(errors="replace").splitlines()[: len(tests)]
    verdicts = [line == f"{secret} 1" for line in lines]
    return verdicts + [False] * (len(tests) - len(verdicts))


def _around(around: Walls, folder: str) -> list[str]:
    if around.command == _SANDBOX_EXEC:
        return [
            *around.command,
            _PROFILE.format(folder=json.dumps(os.path.realpath(folder), ensure_ascii=False)),
        ]
    return list(around.command)


def _watch(process: subprocess.Popen[bytes], limits: Limits, cancelled: threading.Event) -> None:
    """Return when the process has ended, or has met a limit, or is no longer wanted."""
    end = time.monotonic() + limits.seconds
    while (left := end - time.monotonic()) > 0 and not cancelled.is_set():
        try:
            process.wait(min(POLL, left))
            return
        except subprocess.TimeoutExpired:
            processes, memory = usage(process.pid)
        # unshare is a process too
        if memory > limits.memory_mb << 20 or processes > limits.processes + 1:
            return


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; what it started in other groups dies with unshare's namespace."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def usage(leader: int) -> tuple[int, int]:
    """Return (processes, resident bytes) of a process that leads a group, and of what it started.

    psutil counts all descendants; without it ``ps`` counts the group.
    """
    try:
        import psutil
    except ImportError:
        return _usage_by_ps(leader)
    count = size = 0
    try:
        first = psutil.Process(leader)
        for one in (first, *first.children(recursive=True)):
            size += one.memory_info().rss
            count += 1
    except psutil.NoSuchProcess:
        pass
    return count, size


def _usage_by_ps(group: int) -> tuple[int, int]:
    try:
        listed = subprocess.run(
            ("ps", "-A", "-o", "pgid=", "-o", "rss="), capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    sizes = [int(size) for pgid, size in map(str.split, listed.splitlines()) if pgid == str(group)]
    return len(sizes), sum(sizes) << 10
