"""Rows of files, up to their tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st

from mlx_posttrain import jsonl
from mlx_posttrain.data import encode, formats, sources
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests.arbitrary import COUNTS, texts, try_examples, values

COLUMNS = sorted(formats.COLUMNS)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.one_of(st.sampled_from(["user", "assistant", "system"]), values),
                "content": st.one_of(texts, values),
            },
            optional={"weight": values, "thinking": values},
        ),
        values,
    ),
    max_size=3,
)
cells = st.one_of(texts, messages, values)
rows = st.lists(st.dictionaries(st.one_of(st.sampled_from(COLUMNS), texts), cells, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("tiny").folder)


@pytest.mark.parametrize("count", COUNTS)
def test_rows(count, tmp_path, tokenizer):
    def train_on(made: list) -> None:
        path = tmp_path / ("rows.jsonl" if len(made) % 2 else "rows.json")
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in made) if len(made) % 2 else json.dumps(made)
        )
        records, _ = formats.parse_rows(sources.load_rows(str(path)))
        conversations = [r for r in records if isinstance(r, Conversation)]
        encode.encode_all(
            [c for c in conversations if c.turns[-1].role == "assistant"],
            tokenizer,
            max_length=32,
            needed=False,
        )

    try_examples(count, rows, train_on)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_bytes(count, name, tmp_path):
    bits = st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\r", b"1", b"a", b"\xff", b"\xe2\x80\xa8"]
    )
    content = st.one_of(st.binary(max_size=60), st.lists(bits, max_size=30).map(b"".join))

    def load(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        sources.load_rows(str(tmp_path / name))

    try_examples(count, content, load)


@pytest.mark.parametrize("count", COUNTS)
def test_records(count, tmp_path):
    """What is written is read again; of any other bytes nothing sound is lost."""
    path = tmp_path / "records.jsonl"

    def there_and_back(records: list) -> None:
        path.unlink(missing_ok=True)
        jsonl.append(path, records)
        assert json.dumps(jsonl.read(path)) == json.dumps(json.loads(json.dumps(records)))

    whole = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
    try_examples(count, st.lists(st.dictionaries(whole, whole, max_size=3), max_size=4), there_and_back)

    def spoiled(lines: list) -> None:
        path.write_bytes(b"\n".join(lines))
        sound = [line for line in lines if line == b'{"step": 1}']
        jsonl.keep(path, lambda record: True)
        assert path.read_bytes().split(b"\n").count(b'{"step": 1}') == len(sound)
        for kept in tmp_path.glob("records.jsonl.damaged-*"):
            assert kept.read_bytes() == b"\n".join(lines)
            kept.unlink()

    line = st.one_of(st.just(b'{"step": 1}'), st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")))
    try_examples(count, st.lists(line, max_size=6), spoiled)
