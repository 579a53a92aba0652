"""Rows from files, folders, the hub's cache and the embedded data.

Every foreseeable error is one line that names the place.
"""

import gzip
import json
import os
import sys
import tracemalloc
import types
from pathlib import Path

import pytest

from mlx_posttrain.data import bounds, sources
from mlx_posttrain.data.formats import parse_rows
from mlx_posttrain.data.sources import EMBEDDED, load_rows
from mlx_posttrain.errors import UserError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(10)]


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def fault(source: object, **options: object) -> str:
    """Return the message of the UserError, which must be one line."""
    with pytest.raises(UserError) as e:
        load_rows(str(source), **options)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2
    return str(e.value)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "b.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "c.csv", "prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(10)))
    write(tmp_path / "d.jsonl.gz", gzip.compress(jsonl(ROWS).encode()))
    write(tmp_path / "e.json.gz", gzip.compress(json.dumps(ROWS).encode()))
    write(tmp_path / "f.json", jsonl(ROWS))  # JSON lines under the name .json
    write(tmp_path / "g.json", json.dumps({"data": ROWS}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "h.parquet")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "b.json", "c.csv", "d.jsonl.gz", "e.json.gz", "f.json", "g.json", "h.parquet"]
)
def test_every_file_type_gives_the_same_rows(files: Path, name: str) -> None:
    assert load_rows(str(files / name)) == ROWS
    assert load_rows(str(files / name), limit=3) == ROWS[:3]
    shuffled = load_rows(str(files / name), limit=4, shuffle=True, seed=5)
    assert shuffled == load_rows(str(files / "a.jsonl"), limit=4, shuffle=True, seed=5)
    assert len(shuffled) == 4
    assert shuffled != ROWS[:4]
    assert shuffled != load_rows(str(files / name), limit=4, shuffle=True, seed=6)


def test_a_limit_stops_reading_early(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:2]) + "{broken\n")
    assert load_rows(path, limit=2) == ROWS[:2]


def test_bom_crlf_blank_lines_and_line_separators(tmp_path: Path) -> None:
    text = '\ufeff{"text": "a\u2028b"}\r\n\r\n{"text": "日本 \U0001f600"}\r\n'
    path = write(tmp_path / "a.jsonl", text)
    assert load_rows(path) == [{"text": "a\u2028b"}, {"text": "日本 \U0001f600"}]
    path = write(tmp_path / "a.csv", '\ufefftext,n\r\n"one, ""two""\nthree",007\r\n')
    assert load_rows(path) == [{"text": 'one, "two"\nthree', "n": "007"}]  # values stay text
    assert load_rows(write(tmp_path / "a.json", '\ufeff[{"text": null}]')) == [{"text": None}]


def test_a_folder_is_read_by_the_splits_in_its_file_names(tmp_path: Path) -> None:
    write(tmp_path / "x-train-0.jsonl", jsonl(ROWS[:2]))
    write(tmp_path / "x-train-1.jsonl", jsonl(ROWS[2:4]))
    write(tmp_path / "x-valid.jsonl", jsonl(ROWS[4:5]))
    write(tmp_path / ".hidden.jsonl", "{")
    write(tmp_path / "README.md", "about")
    assert load_rows(str(tmp_path)) == ROWS[:4]
    assert load_rows(str(tmp_path), limit=3) == ROWS[:3]
    assert load_rows(str(tmp_path), split="validation") == ROWS[4:5]
    assert load_rows(str(tmp_path / "x-valid.jsonl")) == ROWS[4:5]
    assert "no split 'test' (data.split); its file names give train, validation" in fault(
        tmp_path, split="test"
    )


@pytest.mark.parametrize(
    ("names", "train", "validation", "test"),
    [
        (["training", "evaluation", "holdout"], [0], None, [1, 2]),
        (["testset", "trainset", "validation_set"], [1], [2], [0]),
        (["TrainData", "val-data", "held_out"], [0], [1], [2]),
        (["train1", "dev1", "evalset1"], [0], [1], [2]),
        (["a", "b", "test-prompts"], [0, 1], None, [2]),
        (["my_train", "contest", "other"], [0], None, None),  # the others say nothing
    ],
)
def test_names_of_splits_in_file_names(tmp_path: Path, names, train, validation, test, capsys) -> None:
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.jsonl", jsonl([ROWS[number]]))
    for split, numbers in (("train", train), ("validation", validation), ("test", test)):
        if numbers is None:
            assert f"no split '{split}'" in fault(tmp_path, split=split)
        else:
            assert sorted(row["prompt"] for row in load_rows(str(tmp_path), split=split)) == [
                f"p{n}" for n in numbers
            ]
    left_out = f"{tmp_path}: left out contest.jsonl, other.jsonl: "
    assert (left_out in capsys.readouterr().err) is ("contest" in names)


def test_a_split_by_the_name_of_its_files(tmp_path: Path) -> None:
    for number, name in enumerate(("train_sft", "train_gen", "test_sft")):
        write(tmp_path / f"{name}-00000-of-00001.jsonl", jsonl([ROWS[number]]))
    assert load_rows(str(tmp_path), split="train_gen") == [ROWS[1]]
    assert "no split 'train[:1]'" in fault(tmp_path, split="train[:1]")


def test_a_numbered_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for n in (0, 2):
        write(tmp_path / f"train-0000{n}-of-00003.jsonl", jsonl([ROWS[n]]))
    assert "train-00001-of-00003.jsonl is missing" in fault(tmp_path)
    write(tmp_path / "train-00001-of-00003.jsonl", jsonl([ROWS[1]]))
    assert load_rows(str(tmp_path)) == ROWS[:3]
    for n in (1, 2):  # numbered from 1
        write(tmp_path / f"test-{n}-of-2.jsonl", jsonl([ROWS[n]]))
    assert load_rows(str(tmp_path), split="test") == ROWS[1:3]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    both = {"train": Dataset.from_list(ROWS[:8]), "dev": Dataset.from_list(ROWS[8:])}
    DatasetDict(both).save_to_disk(str(tmp_path / "two"))
    assert load_rows(str(tmp_path / "one")) == ROWS
    assert load_rows(str(tmp_path / "one"), limit=3) == ROWS[:3]
    assert load_rows(str(tmp_path / "two")) == ROWS[:8]
    assert load_rows(str(tmp_path / "two"), split="validation") == ROWS[8:]
    assert "no split 'test' (data.split); it has train, dev" in fault(tmp_path / "two", split="test")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    arrow.unlink()
    assert "not a data set that save_to_disk wrote in full" in fault(tmp_path / "one")


def test_a_copy_of_a_repository_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", jsonl(ROWS))
    write(tmp_path / "dataset_infos.json", '{"default": {"features": {}}}')
    write(tmp_path / "README.md", "about")
    assert load_rows(str(tmp_path)) == ROWS


def test_what_may_not_be_read_and_what_is_no_file(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe.jsonl", "zero.json"):
        assert f"{name}: not a regular file" in fault(tmp_path / name)
    assert "loop.jsonl: a link to 'loop.jsonl', which leads to no file" in fault(tmp_path / "loop.jsonl")

    def refuse(self: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"{tmp_path}: cannot be read (Permission denied)" in fault(tmp_path)
    assert "no such file in " in fault(tmp_path / "none.jsonl")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "c.csv", "h.parquet"])
def test_a_limit_that_leaves_rows_out_says_of_how_many(files: Path, name: str, shuffle: bool, capsys) -> None:
    source = str(files / name)
    assert len(load_rows(source, limit=4, shuffle=shuffle, limit_key="data.limit")) == 4
    assert capsys.readouterr().err == f"{source}: 4 of 10 rows (data.limit)\n"
    for limit in (10, 11, None):
        assert load_rows(source, limit=limit, limit_key="data.limit") == ROWS
    load_rows(source, limit=4)
    assert capsys.readouterr().err == ""


def test_rows_beyond_a_limit_are_counted_up_to_a_bound(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sources, "COUNTED", 5)
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    load_rows(path, limit=2, limit_key="limit")
    assert capsys.readouterr().err.endswith("2 of more than 7 rows (limit)\n")
    # a fault in a row that nobody asked for is no fault
    path = write(tmp_path / "b.jsonl", jsonl(ROWS[:4]) + "{")
    assert load_rows(path, limit=3, limit_key="limit") == ROWS[:3]
    assert capsys.readouterr().err.endswith("3 of more rows (limit)\n")


def test_faults_of_files(tmp_path: Path) -> None:
    good = write(tmp_path / "train.jsonl", jsonl(ROWS))
    assert "train.json: no such file; did you mean 'train.jsonl'?" in fault(tmp_path / "train.json")
    assert "no such file in " in fault(tmp_path / "zzz.csv")
    missing = fault(tmp_path / "nowhere" / "deep" / "train.jsonl")
    assert missing.endswith(f"does not exist either; {tmp_path} does)")
    assert "the file has no rows" in fault(write(tmp_path / "a.jsonl", ""))
    assert "the file has no rows" in fault(write(tmp_path / "a.json", "[]"))
    assert "the file has no rows" in fault(write(tmp_path / "a.csv", "prompt,completion\n"))
    assert "unknown extension '.txt'; accepted are .jsonl" in fault(write(tmp_path / "a.txt", "hello"))
    assert "is one split, read whole, and has no 'test' beside it" in fault(good, split="test")
    # not even one whose name says so, or it would be both training and held-out rows
    named = write(tmp_path / "pairs-test.jsonl", jsonl(ROWS))
    told = fault(named, split="test", split_key="data.eval_split")
    assert "leave out data.eval_split" in told and load_rows(str(named)) == ROWS
    assert "must be at least 1" in fault(good, limit=0)
    (tmp_path / "empty").mkdir()
    assert "no data file in this folder" in fault(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2,\n', "a.jsonl, line 3: broken JSON (Expecting property name"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2: a row must be an object"),
        ("a.jsonl", '"text"\n', 'line 1: a row must be an object like {"text": ...}, found a string'),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.json", '[\n {"a": 1},\n {"a": }\n]', "a.json, line 3: broken JSON (Expecting value, column 8)"),
        ("a.json", '{"a": 1}\n{"a": 2}\n{"a"', "a.json, line 3: broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', "a.json, line 2: not UTF-8"),
        ("a.json", '[{"a": 1}, 7]', "a.json, row 2: a row must be an object"),
        ("a.json", "3", "must hold a list of objects, found a number"),
        ("a.csv", "p,c\na,b\nc,d,e\n", "a.csv, line 3: more fields than the header"),
        (
            "a.csv",
            'p,c\n1,2\na,"b\nc,d\n',
            "a.csv, line 3: broken CSV in the row that begins here (unexpected end of data)",
        ),
        ("a.csv", b"p,c\na,\xe9\n", "a.csv, line 2: not UTF-8"),
        ("a.parquet", "PAR?", "not a readable Parquet file"),
        ("a.jsonl.gz", "not gzip", "broken gzip file"),
        # With a fixed time in gzip's header: the bytes are part of the test's name, and every worker of a
        # parallel run must collect the same names.
        ("b.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-12], "broken gzip file"),
    ],
)
def test_broken_files_name_the_line(tmp_path: Path, name: str, data: str | bytes, expected: str) -> None:
    assert expected in fault(write(tmp_path / name, data))


# Hugging Face datasets, without a network


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and a hub that cannot be reached."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    return tmp_path / "hub"


def fill(hub: Path, name: str, **splits: list) -> None:
    """Write a dataset into the hub cache as `hf download` does."""
    folder = hub / f"datasets--{name.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for split, rows in splits.items():
        write(folder / "snapshots" / commit / f"{split}.jsonl", jsonl(rows))


def test_a_dataset_that_was_downloaded_is_read_offline(hub: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(hub, "someone/pairs", train=ROWS, test=ROWS[:2])
    assert load_rows("someone/pairs", limit=3) == ROWS[:3]
    assert load_rows("someone/pairs", split="test") == ROWS[:2]
    assert sorted(r["prompt"] for r in load_rows("someone/pairs", shuffle=True, seed=1)) == sorted(
        r["prompt"] for r in ROWS
    )
    assert "Generating" not in capfd.readouterr().err  # no progress bars into a log
    message = fault("someone/pairs", split="dev")
    assert "no split 'dev'" in message
    assert "train" in message


def test_a_limit_takes_whole_trees_of_a_dataset(hub: Path) -> None:
    rows = []
    for i in range(3):
        rows.append({"message_id": f"q{i}", "parent_id": None, "text": f"q{i}", "role": "prompter"})
        rows.append({"message_id": f"a{i}", "parent_id": f"q{i}", "text": f"a{i}", "role": "assistant"})
    fill(hub, "someone/trees", train=rows)
    found = load_rows("someone/trees", limit=2)
    assert [[m["content"] for m in row["messages"]] for row in found] == [["q0", "a0"], ["q1", "a1"]]


def test_the_error_for_a_missing_dataset_tells_how_to_get_it(hub: Path) -> None:
    message = fault("yahma/alpaca-cleaned")
    assert "`hf download --repo-type dataset yahma/alpaca-cleaned`" in message
    assert "name a local file" in message


def test_online_errors_are_classified_by_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from mlx_posttrain.data import sources

    def raising(error: Exception) -> None:
        def load(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)

    monkeypatch.setattr(sources, "_hub_is_reachable", lambda: True)
    raising(datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub"))
    assert "no such dataset on the hub" in fault("no/such")
    raising(ConnectionError("Couldn't reach"))
    assert "the hub did not answer (ConnectionError); try again, or run `hf download" in fault("no/such")
    raising(ValueError("Unknown split \"dev\". Should be one of ['train']."))
    assert "no split 'dev' (data.split: Unknown split" in fault("no/such", split="dev")
    raising(
        ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
        )
    )
    assert "pick one among the available configs: ['main', 'socratic']" in fault("openai/gsm8k")


# Embedded data


def test_embedded_sources_get_split_limit_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def rows(**options: object) -> list:
        calls.append(options)
        return ROWS

    fake = types.ModuleType("mlx_posttrain.data.tasks")
    fake.load = fake.preferences = fake.reasoning = rows  # type: ignore[attr-defined]
    fake.question_answers = lambda: ROWS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlx_posttrain.data.tasks", fake)
    monkeypatch.setattr(sys.modules["mlx_posttrain.data"], "tasks", fake, raising=False)
    assert load_rows("embedded/tasks", split="test", limit=4, seed=3) == ROWS[:4]
    assert calls == [{"split": "test", "limit": 4, "seed": 3, "families": None}]
    assert load_rows("embedded/qa", limit=2) == ROWS[:2]
    assert load_rows("embedded/preferences", split="validation") == ROWS
    assert calls[-1]["split"] == "valid"
    assert "did you mean 'embedded/tasks'?" in fault("embedded/task")
    assert "embedded/qa has no split 'test' (data.split), only 'train'" in fault("embedded/qa", split="test")


@pytest.mark.parametrize("source", EMBEDDED)
def test_embedded_rows_are_in_a_known_format(source: str) -> None:
    records, dropped = parse_rows(load_rows(source, limit=20), source=source)
    assert (len(records), dropped) == (20, {})


def test_real_files() -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    assert len(load_rows(str(folder / "instruct" / "short-tasks.jsonl"))) == 1100
    assert len(load_rows(str(folder / "reasoning" / "svamp.jsonl"), limit=7)) == 7
    assert len(load_rows(str(folder / "text"), split="validation", limit=5)) == 5


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path, capfd) -> None:
    text = r'{"prompt": "a\ud83d", "completion": "b", "meta": [{"\udc00": "c"}]}' + "\n" + jsonl(ROWS[:1])
    wanted = [{"prompt": "a\ufffd", "completion": "b", "meta": [{"\ufffd": "c"}]}, ROWS[0]]
    assert load_rows(write(tmp_path / "a.jsonl", text)) == wanted
    assert "a.jsonl: 1 rows with half a surrogate pair" in capfd.readouterr().err
    whole = r'[{"text": "\ud83d\ude00"}]'  # both halves are a character
    assert load_rows(write(tmp_path / "b.json", whole)) == [{"text": "😀"}]
    assert "surrogate" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_cannot_hold(tmp_path: Path, name: str) -> None:
    for value, words in (
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
    ):
        row = '{"text": "a", "meta": ' + value + "}"
        said = fault(write(tmp_path / name, row if name == "a.jsonl" else f"[{row}]"))
        assert words in said and name in said


def test_a_row_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW", 1000)
    rows = [{"text": "a" * 600}, {"text": "b" * 600, "more": "c" * 600}]
    assert "a.jsonl, row 2: 1,200 characters" in fault(write(tmp_path / "a.jsonl", jsonl(rows)))
    assert "row 2: 1,200 characters" in fault(write(tmp_path / "a.json", json.dumps(rows)))
    assert "line 2" in fault(write(tmp_path / "a.jsonl", jsonl([{"text": "a"}, {"text": "b" * 8001}])))
    assert "a.csv, line 2: broken CSV" in fault(write(tmp_path / "a.csv", "text\n" + "a" * 1001 + "\n"))
    assert load_rows(write(tmp_path / "a.jsonl", jsonl([{"text": "é" * 1000}]))) == [{"text": "é" * 1000}]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_a_file_that_unpacks_to_far_too_much(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(bounds, "MAX_UNPACKED", 100_000)
    for data in (b" " * 10_000_000, b"\n" * 10_000_000, b'{"text": "a"}\n' * 1_000_000):
        packed = write(tmp_path / name, gzip.compress(data))
        assert "unpacks to more than" in fault(packed)


def test_json_that_is_read_whole_takes_no_more_than_its_size(tmp_path: Path, monkeypatch) -> None:
    row = {"text": "a", "more": "b" * 1_900_000}
    path = write(tmp_path / "a.json", json.dumps([row] * 4))
    tracemalloc.start()
    assert len(load_rows(path, limit=1)) == 1
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6 * os.path.getsize(path)
    monkeypatch.setattr(bounds, "MAX_WHOLE", 1_000_000)
    for name, data in (("a.json", None), ("a.json.gz", gzip.compress(json.dumps([row]).encode()))):
        packed = path if data is None else write(tmp_path / name, data)
        assert "more than 1,000,000 bytes of JSON, which is read whole" in fault(packed)


def test_a_gzip_file_with_a_damaged_middle(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(jsonl(ROWS * 50).encode()))
    data[10] = 0xFF  # no kind of block
    assert "broken gzip file" in fault(write(tmp_path / "a.jsonl.gz", bytes(data)))


def test_a_role_that_is_no_text_is_named(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(UserError, match="data, row 1: a message's role must be text, found list"):
        parse_rows(rows)
