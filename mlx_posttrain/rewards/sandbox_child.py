"""The process that runs what a model wrote: limits first, then the code, then one line for each test.

Started by rewards/sandbox.py as a script; it imports nothing of this package. The request is JSON on standard
input. Standard output gets ``secret 1`` or ``secret 0`` for each test: the code cannot print that by chance,
and a process that ends early says nothing. Code that looks for the secret in this process can find it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
import types
from typing import Any

# linux/landlock.h; the system calls have these numbers on every architecture
_CREATE, _ADD, _RESTRICT, _NO_NEW_PRIVILEGES = 444, 445, 446, 38
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
#: Writing, removing and making of every kind; then moving between folders and truncating, which came later.
_WRITING = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
_LATER = ((2, 1 << 13), (3, _TRUNCATE))


def landlock_version() -> int:
    """Return the version of Landlock that this Linux has, 0 without it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, libc.syscall(_CREATE, None, 0, 1)) if sys.platform == "linux" else 0


def write_only_below(folder: str) -> None:
    """Forbid this process and its children to change files outside ``folder``, for good (Landlock).

    Raises OSError where the system refuses. Modes and times of files stay open to change.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = landlock_version()
    rights = _WRITING | sum(right for since, right in _LATER if version >= since)

    def ask(*arguments: Any) -> int:
        result = libc.syscall(*arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "landlock")
        return int(result)

    rules = ask(_CREATE, struct.pack("Q", rights), 8, 0)
    for path, allowed in ((folder, rights), (os.devnull, rights & (_WRITE_FILE | _TRUNCATE))):
        beneath = struct.pack("=Qi", allowed, os.open(path, os.O_PATH))
        ask(_ADD, rules, 1, beneath, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    ask(_RESTRICT, rules, 0)


def limit(limits: dict[str, int]) -> None:
    """Set resource limits by name, none above what the system allows."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Run the request."""
    request = json.load(sys.stdin)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    limit(request["limits"])
    if request["landlock"]:
        write_only_below(os.getcwd())
    answer = types.ModuleType("answer")
    sys.modules["answer"] = answer
    for text in (request["setup"], request["code"]):
        exec(compile(text, "<answer>", "exec"), answer.__dict__)
    for test in request["tests"]:
        try:
            exec(compile(test, "<test>", "exec"), answer.__dict__)
            passed = 1
        except BaseException:  # SystemExit too: no way out of a test is a pass
            passed = 0
        os.write(report, f"{request['secret']} {passed}\n".encode())


if __name__ == "__main__":
    main()
