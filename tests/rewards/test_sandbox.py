"""Code that a model wrote: what it may do, what it may not, and what is left of it afterwards."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import functions, python_tests, sandbox
from tests.helpers import reward_scores

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="how Linux does it")
QUICK = sandbox.Limits(seconds=2.0, memory_mb=300)


def run(code, *tests, limits=QUICK, setup="", cancelled=None):
    return sandbox.passed(code, tests or ["assert True"], setup, limits, cancelled or threading.Event())


@pytest.fixture(params=["all walls", "none"])
def any_walls(request, monkeypatch):
    """What this system offers, and then nothing of it."""
    if request.param == "none":
        monkeypatch.setattr(sandbox, "walls", lambda: sandbox.Walls((), False))


def test_each_test_passes_or_fails_by_itself(any_walls):
    code = "def double(x):\n    return 2 * x\n"
    tests = [
        "assert double(2) == 4",
        "assert double(2) == 5",
        "import sys; sys.exit(0)",
        "assert double('a') == 'aa'",
    ]
    assert run(code, *tests) == [True, False, False, True]
    assert run("y = x + 1", "assert y == 4", setup="x = 3") == [True]
    assert run("def f(:", "assert True") == run("1 / 0", "assert True") == [False]
    assert run(code, "assert double(2) ==") == [False]


def test_ending_early_or_printing_is_no_pass(any_walls):
    for code in (
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('0 1'); print('passed')",
        "import os; os.close(3); os.close(4)",
        "import signal, os; os.kill(os.getpid(), signal.SIGKILL)",
        "raise SystemExit",
    ):
        assert run(code, "assert False") == [False], code
        assert run(code + "; import os; os._exit(0)", "assert True") == [False], code


def test_an_endless_loop(any_walls):
    begun = time.monotonic()
    assert run("while True: pass", limits=dataclasses.replace(QUICK, seconds=0.5)) == [False]
    assert run("import time; time.sleep(60)", limits=dataclasses.replace(QUICK, seconds=0.5)) == [False]
    assert time.monotonic() - begun < 15
    found = run(
        "", "assert True", "while True: pass", "assert True", limits=dataclasses.replace(QUICK, seconds=1.5)
    )
    assert found == [True, False, False]


def test_no_longer_wanted():
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    begun = time.monotonic()
    assert run("while True: pass", limits=dataclasses.replace(QUICK, seconds=60), cancelled=cancelled) == [
        False
    ]
    assert time.monotonic() - begun < 20


BOMB = "a = bytearray(500 << 20)\nfor i in range(0, len(a), 4096): a[i] = 1\n"


@LINUX
def test_a_memory_bomb_meets_the_limit_of_the_system():
    assert run(BOMB) == [False]
    assert run("a = bytearray(50 << 20)") == [True]


@pytest.mark.parametrize("by_ps", [False, True])
def test_a_memory_bomb_is_seen_where_the_system_does_not_hold_the_limit(monkeypatch, by_ps):
    monkeypatch.setattr(sandbox, "ADDRESS_SPACE_BINDS", False)
    if by_ps:
        monkeypatch.setitem(sys.modules, "psutil", None)
    assert run(BOMB, limits=sandbox.Limits(seconds=40, memory_mb=900)) == [True]
    slow = BOMB + "import time; time.sleep(60)"
    begun = time.monotonic()
    assert run(slow, limits=sandbox.Limits(seconds=40, memory_mb=200)) == [False]
    assert time.monotonic() - begun < 30  # killed, and not merely waited for


def test_both_counts_of_a_group_agree():
    pytest.importorskip("psutil")
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'input()']); input()"
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 20
        while sandbox.usage(process.pid)[0] < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.5)
        (count, size), (count_by_ps, size_by_ps) = (
            sandbox.usage(process.pid),
            sandbox._usage_by_ps(process.pid),
        )
        assert count == count_by_ps == 2 and size == pytest.approx(size_by_ps, rel=0.3) and size > 5 << 20
    finally:
        sandbox._kill(process)


def mine(mark):
    """The processes that have ``mark`` in their command line."""
    psutil = pytest.importorskip("psutil")
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


@LINUX
@pytest.mark.skipif(not sandbox.walls().command, reason="needs a namespace of processes")
def test_a_fork_bomb_and_what_runs_away_are_all_killed():
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    # children in sessions of their own, which a group's kill does not reach; bounded, should the limit fail
    bomb = f"""
import os, sys, time
for _ in range(200):
    if os.fork() == 0:
        os.setsid()
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", {mark!r}])
    time.sleep(0.005)
time.sleep(60)
"""
    begun = time.monotonic()
    assert run(bomb, limits=sandbox.Limits(seconds=30, processes=16)) == [False]
    assert time.monotonic() - begun < 25
    end = time.monotonic() + 10
    while mine(mark):
        assert time.monotonic() < end
        time.sleep(0.05)


@LINUX
@pytest.mark.skipif(not sandbox.walls().landlock, reason="needs Landlock")
def test_writing_outside(tmp_path):
    target = tmp_path / "mine.txt"
    target.write_text("kept")
    attempts = (
        f"open({str(target)!r}, 'w').write('gone')",
        f"open({str(target)!r}, 'r+').truncate(0)",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os; os.remove({str(target)!r})",
        f"import os; os.rename({str(target)!r}, 'here')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import os; os.symlink('/', {str(tmp_path / 'new')!r})",
        f"import os; os.truncate({str(target)!r}, 0)",
        f"import subprocess; subprocess.run(['rm', {str(target)!r}], check=True)",
    )
    for code in attempts:
        assert run(code) == [False], code
        assert target.read_text() == "kept" and os.listdir(tmp_path) == ["mine.txt"], code
    # and inside, and reading
    inside = "import os; os.mkdir('a'); open('a/b', 'w').write('c'); open(os.devnull, 'w').write('x')"
    assert run(inside, "assert open('a/b').read() == 'c'") == [True]
    assert run(f"text = open({str(target)!r}).read()", "assert text == 'kept'") == [True]


def test_its_folder_is_its_own_and_is_removed():
    code = "import os, tempfile; here = os.getcwd(); assert os.listdir() == []; open('a', 'w')"
    names = "assert os.path.realpath(tempfile.gettempdir()) == os.path.realpath(here)"
    assert run(code, names, "assert 'mlx-posttrain-tests-' in here") == [True, True]


def test_a_large_file():
    code = "f = open('big', 'wb')\nfor _ in range(40): f.write(bytes(1 << 20))\n"
    assert run(code) == [False]


def test_no_secrets_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run("import os", "assert 'secret' not in os.environ.values()") == [True]


@pytest.mark.skipif(not sandbox.walls().command, reason="needs a namespace of networks, or sandbox-exec")
def test_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert run(code) == [False]


def test_what_the_system_lacks_is_said():
    lacks = sandbox.Walls((), False).describe()
    assert "NETWORK IS OPEN" in lacks and "ARE OPEN" in lacks
    linux = sandbox.Walls(sandbox._UNSHARE, True).describe()
    assert "no network (unshare)" in linux and "(Landlock)" in linux and "OPEN" not in linux
    mac = sandbox.Walls(sandbox._SANDBOX_EXEC, False).describe()
    assert mac.count("(sandbox-exec)") == 2 and "OPEN" not in mac
    bare = sandbox.Walls(sandbox._UNSHARE, False).describe()
    assert "no network" in bare and "ARE OPEN" in bare
    assert all("\n" not in text for text in (lacks, linux, mac, bare))


def test_the_profile_for_macos():
    command, flag, profile = sandbox._around(sandbox.Walls(sandbox._SANDBOX_EXEC, False), '/a "b')
    assert (command, flag) == ("sandbox-exec", "-p")
    assert r'(subpath "/a \"b")' in profile and profile.count("(") == profile.count(")")
    assert {"network*", "process-fork", "signal", "file-write*"} == set(
        re.findall(r"\(deny ([\w*-]+)", profile)
    )


ANSWER = "<think>```python\nno\n```</think>So:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."


def test_the_reward(capfd):
    python_tests._begin.cache_clear()
    tests = ["assert double(2) == 4", "assert double(2) == 5"]
    texts = [ANSWER, ANSWER, ANSWER, "def double(x): return 5", "no code", "x", "x"]
    columns = {
        "test_list": [tests[:1], tests, tests, tests, tests, None, []],
        "tests": [None, None, "assert double(3) == 6", None, None, None, None],
    }
    for by, expected in (("all", [1, 0, 1, 0, 0, None, None]), ("share", [1, 0.5, 1, 0.5, 0, None, None])):
        assert reward_scores("python_tests", texts, {"allow": True, "by": by}, **columns) == expected
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("python_tests: ")]
    assert said == [f"python_tests: what the model writes will be run: {sandbox.walls().describe()}"]


def test_the_reward_is_off_unless_allowed():
    for args in ({}, {"allow": False}, {"seconds": 3}):
        with pytest.raises(UserError, match=r"runs code that the model writes.*args: \{allow: true\}"):
            functions.bind(functions.load("python_tests"), args, "python_tests")


def test_limits_or_walls_that_nothing_can_run_in_are_an_error_and_no_score(monkeypatch):
    columns = {"tests": ["pass"]}
    with pytest.raises(
        UserError, match=r"a program of one line does not run here within 1e-06 s and 1024 MB"
    ):
        reward_scores("python_tests", ["x = 1"], {"allow": True, "seconds": 1e-6}, **columns)
    python_tests._begin.cache_clear()
    monkeypatch.setattr(sandbox, "walls", lambda: sandbox.Walls(("false",), False))
    with pytest.raises(UserError, match="see whether `false python` starts"):
        reward_scores("python_tests", ["x = 1"], {"allow": True}, **columns)


def test_a_limit_shorter_than_the_first_look_holds(monkeypatch):
    monkeypatch.setattr(sandbox, "POLL", 5.0)
    limits, code = sandbox.Limits(seconds=0.5), "import time; time.sleep(1.5)"
    assert sandbox.passed(code, ["pass"], "", limits, threading.Event()) == [False]
    assert sandbox.passed(code, ["pass"], "", sandbox.Limits(seconds=20.0), threading.Event()) == [True]


def test_the_time_limit_of_the_whole_call_ends_what_still_runs():
    bound = functions.bind(functions.load("python_tests"), {"allow": True, "seconds": 60}, "python_tests")
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"python_tests: it took longer than 0\.5 s"):
        functions.call(bound, ["p"] * 2, ["while True: pass"] * 2, {"tests": ["x"] * 2}, "python_tests", 0.5)
    assert time.monotonic() - begun < 20
