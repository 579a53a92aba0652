"""docs/data.md says what the parsers say of themselves, and its examples are read as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_posttrain.data import formats
from mlx_posttrain.data.cells import FORMATS
from mlx_posttrain.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_table_is_the_one_that_the_parsers_give():
    page = PAGE.read_text(encoding="utf-8")
    written = page.partition("<!-- formats -->\n")[2].partition("<!-- /formats -->")[0]
    assert written == "".join(f"{line}\n" for line in formats.table())
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(FORMATS) == set(formats.NAMES)
    for format in FORMATS.values():
        assert (
            format.description.endswith((".", "(true or false, 1 or 0).")) and "|" not in format.description
        )


@pytest.mark.parametrize("name", formats.NAMES)
def test_every_example_is_read_as_its_format(name):
    line = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}`")
    )
    row = json.loads(re.search(r"`(\{.*\})` \|$", line)[1])
    format = FORMATS[name]
    assert row == format.example and row.keys() <= {*format.columns, "answer"}
    assert (formats.detect(row) == name) is format.detected
    if name == "stepwise":
        with pytest.raises(UserError, match="stepwise"):
            formats.parse_rows([row])
        return
    parsed = formats.parse_all([row], format="auto" if format.detected else name)
    assert len(parsed.records) == 1 and not parsed.dropped
    assert set(parsed.unread) <= {"answer"}  # a short answer is for checkers
