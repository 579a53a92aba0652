"""Files that are not quite what their name says: read where that is possible, else named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mlx_posttrain.data.formats import parse_rows
from mlx_posttrain.data.sources import load_rows
from mlx_posttrain.errors import UserError

ROWS = [{"instruction": f"q{i}, please", "output": f"a{i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHATS = [
    [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}] for i in range(3)
]  # conversations without a column around them


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def table(delimiter: str, end: str) -> str:
    lines = [("instruction", "output"), *(tuple(row.values()) for row in ROWS)]
    quoted = (tuple(f'"{cell}"' if delimiter in cell else cell for cell in line) for line in lines)
    return "".join(delimiter.join(line) + end for line in quoted)


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


READ = {
    "a list": ("a.jsonl", json.dumps(ROWS)),
    "a list on many lines": ("a.jsonl", "\ufeff" + json.dumps(ROWS, indent=1)),
    "an object on many lines": ("a.jsonl", json.dumps({"data": ROWS}, indent=1)),
    "data beside a version": ("a.json", json.dumps({"version": "1.0", "data": ROWS})),
    "rows beside lists": ("a.json", json.dumps({"authors": ["x", "y"], "note": {}, "examples": ROWS})),
    "one name for all": ("a.json", json.dumps({"my rows": ROWS})),
    "packed": ("a.jsonl", gzip.compress(LINES.encode())),
    "packed list": ("a.jsonl", gzip.compress(json.dumps(ROWS).encode())),
    "packed table": ("a.csv.gz", gzip.compress(table(",", "\n").encode())),
    "Parquet": ("a.jsonl", parquet),
    "comma": ("a.csv", table(",", "\n")),
    "semicolon": ("a.csv", table(";", "\r\n")),
    "tab": ("a.csv", table("\t", "\n")),
    "tsv": ("a.tsv", table("\t", "\n")),
    "bar": ("a.csv", table("|", "\n")),
    "old Mac": ("a.csv", table(",", "\r")),
    "old Mac, semicolon, packed": ("a.csv", gzip.compress(table(";", "\r").encode())),
}


@pytest.mark.parametrize("kind", READ)
def test_files_under_another_name(kind, tmp_path: Path):
    name, data = READ[kind]
    path = write(tmp_path / name, data() if callable(data) else data)
    assert load_rows(path) == ROWS and load_rows(path, limit=2) == ROWS[:2]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_within_a_field_of_a_table_are_kept(end, tmp_path: Path):
    path = write(tmp_path / "a.csv", f'text;n{end}"one\rtwo\nthree";1{end}four;2{end}'.encode())
    assert load_rows(path) == [{"text": "one\rtwo\nthree", "n": "1"}, {"text": "four", "n": "2"}]


def test_a_return_within_a_line_is_no_end_where_lines_end_otherwise(tmp_path: Path):
    path = write(tmp_path / "a.csv", b"instruction,output\nq,one\rtwo\n")
    with pytest.raises(UserError, match="line 2: broken CSV"):
        load_rows(path)


def test_a_table_of_one_column_keeps_its_commas(tmp_path: Path):
    assert load_rows(write(tmp_path / "a.csv", 'text\n"a; b, c"\nd; e\n')) == [
        {"text": "a; b, c"},
        {"text": "d; e"},
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", json.dumps(CHATS)),
        ("a.jsonl", json.dumps(CHATS)),
        ("a.jsonl", "".join(json.dumps(chat) + "\n" for chat in CHATS)),
    ],
)
def test_conversations_without_a_column(name, data, tmp_path: Path):
    rows = load_rows(write(tmp_path / name, data))
    assert rows == [{"messages": chat} for chat in CHATS]
    assert [r.turns[-1].content for r in parse_rows(rows)[0]] == ["a0", "a1", "a2"]
    assert load_rows(write(tmp_path / "b.json", json.dumps(CHATS[0]))) == [{"messages": CHATS[0]}]


def test_one_row_that_holds_a_list_is_one_row(tmp_path: Path):
    for row in (
        {"messages": CHATS[0]},
        {"conversations": CHATS[0], "id": "x"},
        {"instruction": "q", "output": "a", "sources": [{"name": "x"}]},
        {"prompt": "q", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}]},
    ):
        for name in ("a.json", "a.jsonl"):
            assert load_rows(write(tmp_path / name, json.dumps(row))) == [row]


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path):
    line = '{"text": "NaN stays", "n": NaN, "list": [Infinity, {"m": -Infinity}, 1.5]}'
    wanted = [{"text": "NaN stays", "n": None, "list": [None, {"m": None}, 1.5]}]
    assert load_rows(write(tmp_path / "a.jsonl", line)) == wanted
    assert load_rows(write(tmp_path / "a.json", f"[{line}]")) == wanted
    scored = '{"prompt": "q", "completions": ["a", "b", "c"], "scores": [NaN, 1, 2]}'
    ((pair,), _) = parse_rows(load_rows(write(tmp_path / "b.jsonl", scored)))
    assert (pair.chosen, pair.rejected) == ("c", "b")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
BY_COLUMNS = {"instruction": {"0": "q", "1": "r"}, "output": {"0": "a", "1": "b"}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (POINTER, "a Git LFS pointer, not the data itself; run `git lfs pull`"),
        (PAGE, "a web page, not the data itself; download the file behind the page"),
        (b"PK\x03\x04rest", "this is a ZIP archive (or a spreadsheet); unpack it"),
        (b"\x28\xb5\x2f\xfdrest", "this is compressed with zstd; unpack it with `zstd -d`"),
        (LINES.encode("utf-16"), "this is UTF-16 text; save it as UTF-8"),
    ],
)
def test_files_that_are_no_data_are_named(name, data, words, tmp_path: Path):
    with pytest.raises(UserError) as error:
        load_rows(write(tmp_path / name, data))
    assert f"{name}: {words}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", "instruction,output,output\nq,FIRST,a\n", "two columns are called 'output'; rename one"),
        ("a.csv", "n;text;n\n1;a;2\n", "two columns are called 'n'"),
        (
            "a.json",
            json.dumps({"train": ROWS, "test": ROWS}),
            "several lists of rows in one file (train, test)",
        ),
        ("a.json", json.dumps(BY_COLUMNS), "a table by columns (instruction, output), as pandas writes it"),
    ],
)
def test_files_that_would_be_misread_are_named(name, data, words, tmp_path: Path):
    with pytest.raises(UserError) as error:
        load_rows(write(tmp_path / name, data))
    assert f"{name}: {words}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (("timestamp", "s"), 2 * 253402300800),  # year 12000 and later
        (("date32",), 10**7),
        (("timestamp", "us", "Nowhere/Land"), 1),
        (("string",), b"\xff\xfe"),
    ],
    ids=["timestamp", "date", "time zone", "text"],
)
def test_values_of_parquet_that_python_cannot_hold_are_named(kind, value, tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    name, *options = kind
    if name == "string":
        raw = pyarrow.array([value])
        values = pyarrow.Array.from_buffers(pyarrow.string(), 1, raw.buffers())
    else:
        values = pyarrow.array([value], pyarrow.int32() if name == "date32" else pyarrow.int64())
        values = values.view(getattr(pyarrow, name)(*options))
    table = pyarrow.table({"instruction": ["a"], "output": ["b"], "when": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column 'when' has a value that cannot be read"):
        load_rows(str(tmp_path / "a.parquet"))


def test_two_columns_of_parquet_with_one_name_are_refused(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays(
        [pyarrow.array([x]) for x in "abc"], ["instruction", "output", "output"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns are called 'output'"):
        load_rows(str(tmp_path / "a.parquet"))


def test_texts_that_parquet_stores_once_are_not_unpacked_by_the_thousand(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), ["w " * 500_000])
    table = pyarrow.table({"instruction": ["a"] * 600, "output": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    before = pyarrow.default_memory_pool().max_memory()
    assert len(load_rows(str(tmp_path / "a.parquet"), limit=2)) == 2
    most = pyarrow.default_memory_pool().max_memory()
    assert most == before or most < 200_000_000
