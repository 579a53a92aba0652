"""Trees of messages: one conversation each, along the best answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mlx_posttrain.data.formats import parse_all
from mlx_posttrain.data.sources import load_rows
from mlx_posttrain.errors import UserError
from tests.helpers import write_jsonl


def message(name: str, parent: str | None, role: str, rank: int | None = None, **more: object) -> dict:
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, "rank": rank, **more}


#            q1                   q2            q3
#      a1 (1)    a2 (0)          a3, a4        (no answer)
#      f1     f2 (1)   f3 (0)
#      b1     b2       (no answer)
TABLE = [
    message("a1", "q1", "assistant", 1, lang="en"),
    message("q1", None, "prompter", lang="en", message_tree_id="t1"),
    message("a2", "q1", "assistant", 0),
    message("f1", "a1", "prompter", 0),
    message("b1", "f1", "assistant", 0),
    message("f3", "a2", "prompter", 0),
    message("f2", "a2", "prompter", 1),
    message("b2", "f2", "assistant", 0),
    message("q2", None, "prompter"),
    message("a3", "q2", "assistant"),
    message("a4", "q2", "assistant"),
    message("q3", None, "prompter"),
]


def nested(name: str) -> dict:
    found = {k: v for k, v in next(m for m in TABLE if m["message_id"] == name).items() if k != "parent_id"}
    return {**found, "replies": [nested(m["message_id"]) for m in TABLE if m["parent_id"] == name]}


def conversations(rows: list[dict]) -> list[list[str]]:
    return [[turn.content for turn in record.turns] for record in parse_all(rows).records]


BEST = [["q1", "a2"], ["q2", "a3"]]  # a2 has the lower rank, and its best reply is not answered


@pytest.mark.parametrize("form", ["table", "table as CSV", "nested"])
def test_the_best_answers_make_one_conversation_a_tree(form, tmp_path: Path):
    path = tmp_path / ("trees.csv" if "CSV" in form else "trees.jsonl")
    if form == "table":
        write_jsonl(path, TABLE)
    elif form == "nested":
        trees = [
            {"message_tree_id": f"t{q}", "tree_state": "ready", "prompt": nested(q)}
            for q in ("q1", "q2", "q3")
        ]
        write_jsonl(path, trees)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["message_id", "parent_id", "text", "role", "rank", "lang"])
            writer.writeheader()
            writer.writerows({k: m.get(k) for k in writer.fieldnames} for m in TABLE)
    rows = load_rows(str(path))
    assert [[m["content"] for m in row["messages"]] for row in rows] == [
        ["q1", "a2", "f3"],
        ["q2", "a3"],
        ["q3"],
    ]
    parsed = parse_all(rows)
    assert conversations(rows) == BEST and parsed.dropped == {"no assistant turn": 1}
    assert [t.role for t in parsed.records[0].turns] == ["user", "assistant"]
    # a limit takes whole trees, not messages
    assert load_rows(str(path), limit=2) == rows[:2]
    assert sorted(map(json.dumps, load_rows(str(path), shuffle=True))) == sorted(map(json.dumps, rows))


def test_deleted_messages_and_what_answers_nothing(tmp_path: Path, capsys):
    rows = [
        {**m, "deleted": m["message_id"] == "a2", "review_result": m["message_id"] != "a3"} for m in TABLE
    ]
    rows.append(message("x1", "gone", "assistant"))
    rows.append(message("x2", "x2", "assistant"))  # answers itself, and is never reached
    found = load_rows(str(write_jsonl(tmp_path / "trees.jsonl", rows)))
    assert conversations(found) == [["q1", "a1", "f1", "b1"], ["q2", "a4"]]
    assert "1 messages answer one that is not in the file; they are left out" in capsys.readouterr().err


def test_messages_of_one_name_make_no_endless_thread(tmp_path: Path):
    rows = [message("q", None, "prompter"), message("a", "q", "assistant"), message("q", "a", "prompter")]
    (found,) = load_rows(str(write_jsonl(tmp_path / "trees.jsonl", rows)))
    assert [m["content"] for m in found["messages"]] == ["q", "a", "q"]


def test_rows_that_are_no_trees_stay_as_they_are(tmp_path: Path):
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": {"replies": 7}}, {"text": "a", "role": "b"}]
    assert load_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows))) == rows


def test_messages_that_answer_each_other_in_a_circle(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [message("a", "b", "prompter"), message("b", "a", "assistant")])
    with pytest.raises(UserError, match="every message has a parent_id, so no conversation has a beginning"):
        load_rows(str(path))
