"""What reaches a terminal."""

from __future__ import annotations

import json

import pytest

from mlx_posttrain.console import Progress, lines_once, log, printable, shown
from mlx_posttrain.errors import UserError
from tests.helpers import refused


def test_characters_that_steer_a_terminal_are_escaped(capfd):
    log("a\x1b]0;title\x07 b\u202ec\td\ne\x9b2J\ud83d é 😀")
    assert capfd.readouterr().err == "a\\x1b]0;title\\x07 b\\u202ec\td\ne\\x9b2J\\ud83d é 😀\n"
    assert printable("a b\n") == "a b\n"


def test_equal_lines_are_printed_once_where_asked(capfd):
    for _ in range(2):
        with lines_once():
            log("96 of 300 rows")
            with lines_once():
                log("96 of 300 rows")
            log("another")
            log("another")
    log("another")
    assert capfd.readouterr().err == "96 of 300 rows\nanother\n" * 2 + "another\n"


def test_a_column_cannot_write_to_the_terminal(tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b[2J\x1b]0;owned\x07": "a"}) + "\n")
    said = refused(capfd, "plan", "01_sft", "model=tiny", f"data.source={tmp_path / 'rows.jsonl'}")
    assert "\x1b" not in said and r"\x1b[2J\x1b]0;owned\x07" in said


def test_an_error_is_one_line_of_readable_length():
    assert str(UserError("column 'a\r\n  b' is none\n")) == "column 'a b' is none "
    assert len(str(UserError("x" * 100_000))) < 4000


@pytest.mark.parametrize(
    ("terminal", "kind", "bar"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_steps_are_lines_where_a_bar_cannot_be_shown(terminal, kind, bar, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", kind)
    progress = Progress("run", 2)
    progress.update(1, 0.5, 10, 1.0)
    progress.close()
    assert (progress.bar is not None) == bar
    assert bar or capsys.readouterr().err.startswith("run 1/2  loss 0.500")


def test_a_models_text_is_escaped_on_a_terminal_only(monkeypatch):
    assert shown("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert shown("a\x1b[2J\n") == "a\\x1b[2J\n"
