"""What reaches a terminal."""

from __future__ import annotations

import json

from mlx_posttrain.console import log, printable
from mlx_posttrain.errors import UserError
from tests.helpers import refused


def test_characters_that_steer_a_terminal_are_escaped(capfd):
    log("a\x1b]0;title\x07 b\u202ec\td\ne\x9b2J\ud83d é 😀")
    assert capfd.readouterr().err == "a\\x1b]0;title\\x07 b\\u202ec\td\ne\\x9b2J\\ud83d é 😀\n"
    assert printable("a b\n") == "a b\n"


def test_a_column_cannot_write_to_the_terminal(tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b[2J\x1b]0;owned\x07": "a"}) + "\n")
    said = refused(capfd, "plan", "01_sft", "model=tiny", f"data.source={tmp_path / 'rows.jsonl'}")
    assert "\x1b" not in said and r"\x1b[2J\x1b]0;owned\x07" in said


def test_an_error_is_one_line_of_readable_length():
    assert str(UserError("column 'a\r\n  b' is none\n")) == "column 'a b' is none "
    assert len(str(UserError("x" * 100_000))) < 4000
