"""Files with one record a line: what a text holds does not end a line, and nothing sound is lost."""

from __future__ import annotations

import json

import pytest

from mlx_posttrain import jsonl, runs
from mlx_posttrain.errors import UserError

#: Characters at which str.splitlines splits, besides the newline and what JSON escapes.
SEPARATORS = "\u0085\u2028\u2029"


def test_separators_of_unicode_end_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    records = [{"text": f"a{c}b", "step": n} for n, c in enumerate(SEPARATORS)]
    jsonl.append(path, records[:1])
    jsonl.append(path, records[1:])
    assert path.read_text(encoding="utf-8").count("\n") == 3
    assert jsonl.read(path) == records
    jsonl.keep(path, lambda r: r["step"] != 1)
    assert jsonl.read(path) == [records[0], records[2]]


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    jsonl.append(tmp_path / "rows.jsonl", [{"text": "half \ud83d, é"}])
    assert (tmp_path / "rows.jsonl").read_bytes() == '{"text": "half \\ud83d, é"}\n'.encode()
    assert jsonl.read(tmp_path / "rows.jsonl") == [{"text": "half \ud83d, é"}]


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"text": "é'.encode()[:-1], "\0\0\0"], ids=str)
def test_an_unfinished_last_line_goes(cut, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":  1}\n' + (cut if isinstance(cut, bytes) else cut.encode()))
    assert jsonl.read(path) == [{"step": 1}]
    jsonl.keep(path, lambda r: True)
    assert path.read_bytes() == b'{"step":  1}\n'


def test_a_last_line_that_only_lacks_its_newline_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert jsonl.read(path) == [{"step": 1}, {"step": 2}]
    jsonl.keep(path, lambda r: True)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "garbage",
    [b"garbage", b"\xff\xfe", b"[1]", b'{"step": 2', b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=range(6),
)
def test_a_broken_line_costs_no_other(garbage, tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n{"step": 4}\n'
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object; correct or delete"):
        jsonl.read(path)
    runs.Run(tmp_path).truncate_logs(3)
    assert jsonl.read(path) == [{"step": 1}, {"step": 3}]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == whole
    assert "line 2 is not a JSON object; the file as it was is kept as metrics.jsonl.damaged-1" in (
        capfd.readouterr().err
    )
    path.write_bytes(whole)
    runs.Run(tmp_path).truncate_logs(3)
    assert (tmp_path / "metrics.jsonl.damaged-2").is_file()


def test_a_file_with_nothing_to_take_out_is_not_written(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"answer": "of no step"}) + "\n")
    before = path.stat()
    runs.Run(tmp_path).truncate_logs(1)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_no_file_has_no_records(tmp_path):
    jsonl.keep(tmp_path / "none.jsonl", lambda r: True)
    assert jsonl.read(tmp_path / "none.jsonl") == [] and not (tmp_path / "none.jsonl").exists()
