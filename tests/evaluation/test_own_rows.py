"""Models are asked what their own run held out, as it read its rows, and what none of them trained on."""

from __future__ import annotations

import pytest
import yaml

from mlx_posttrain.config import DataSection
from mlx_posttrain.data.read import read_conversations
from mlx_posttrain.data.split import opening, split_rows
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import own_rows
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.models.source import Source
from tests.helpers import write_jsonl

NAMES = {"instruction": "frage", "output": "antwort"}


@pytest.fixture
def rows(tmp_path):
    made = ({"frage": f"Was ist {n} plus 1?", "antwort": f"{n + 1}"} for n in range(60))
    return str(write_jsonl(tmp_path / "fragen.jsonl", made))


def run(source, method="sft", seed=0, **data):
    full = DataSection(source=source, **{"columns": NAMES} | data).model_dump()
    return Source(None, None, {"method": method, "seed": seed, "data": full})


def asked(found):
    return [row.turns[-2].content for row in found.questions]


def test_the_held_out_rows_of_a_run_are_those_of_its_training(rows, tmp_path):
    model = run(rows, holdout=7, seed=3)
    found = own_rows.read(["base", "sft"], [Source(tmp_path), model], 160)
    train, held_out = split_rows(DataSection(**model.recipe["data"]), 3, read_conversations)
    assert asked(found) == [row.turns[0].content for row in held_out] and len(held_out) == 7
    assert found.where == "held out from sft's fragen.jsonl"
    assert not {q.casefold() for q in asked(found)} & {opening(row) for row in train}
    assert len(own_rows.read(["sft"], [model], 2).questions) == 2


def test_what_another_run_trained_on_is_left_out(rows, capsys):
    one, two = run(rows, holdout=30), run(rows, holdout=30, seed=1)
    both = own_rows.read(["one", "two"], [one, two], 160)
    sides = [set(asked(own_rows.read(["x"], [model], 160))) for model in (one, two)]
    assert set(asked(both)) == sides[0] & sides[1] and 0 < len(both.questions) < 30
    assert "rows left out: two trained on them" in capsys.readouterr().err
    # as is what a run's model was trained on before
    assert own_rows.read(["one", "two"], [one, run(rows, holdout=30, template="chat")], 160).questions


def test_rows_that_the_other_knows_are_asked_where_there_are_no_others(rows, capsys):
    found = own_rows.read(["one", "two"], [run(rows, holdout=3), run(rows, holdout=0)], 160)
    assert len(found.questions) == 3 and found.where.endswith("(all trained on by two)")
    assert "two trained on every row that one held out" in capsys.readouterr().err


def test_a_model_that_the_run_started_from_counts(rows, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    (before / "recipe.yaml").write_text(
        yaml.safe_dump(run(rows, holdout=30, seed=1).recipe | {"model": "tiny"})
    )
    model = run(rows, holdout=30)
    alone = len(own_rows.read(["x"], [model], 160).questions)
    model.recipe["model"] = str(before)
    assert len(own_rows.read(["x"], [model], 160).questions) < alone == 30


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_pairs_are_asked_once_with_the_good_answer(method, tmp_path):
    made = [{"prompt": f"Say {n // 2}.", "chosen": f"{n // 2}!", "rejected": f"no {n}"} for n in range(40)]
    model = run(str(write_jsonl(tmp_path / "pairs.jsonl", made)), method, columns={}, holdout=8)
    found = own_rows.read(["x"], [model], 160)
    assert len(set(asked(found))) == len(found.questions) == (4 if method == "dpo" else 2)
    assert all(row.turns[-1].content in row.turns[-2].content.replace(".", "!") for row in found.questions)


def test_texts_are_read_and_not_asked(tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"The tale of {n}."} for n in range(10)])
    found = own_rows.read(["x"], [run(str(source), columns={}, holdout=2)], 160)
    assert not found.questions and len(found.texts) == 2 and found.texts[0].startswith("The tale of")


def test_who_is_asked_the_embedded_questions(rows, capsys, tmp_path):
    embedded, mine = run("embedded/tasks", columns={}), run(rows)
    assert own_rows.read(["a"], [embedded], 160) is None
    assert own_rows.read(["a", "b"], [embedded, mine], 160) is None
    assert "b had other rows" in capsys.readouterr().err
    assert own_rows.read(["b", "a"], [mine, embedded], 160).questions
    assert own_rows.read(["base"], [Source(tmp_path)], 160) is None
    assert own_rows.with_rows(SuiteSection(), [Source(tmp_path)]).rows == "embedded/tasks"
    assert "no run here says what to ask" in capsys.readouterr().err


def test_columns_are_inherited_where_the_file_has_them(rows, tmp_path):
    other = str(write_jsonl(tmp_path / "other.jsonl", [{"question": "q", "answer": "a"}]))
    models = [Source(tmp_path), run(rows)]
    assert own_rows.with_rows(SuiteSection(rows=rows), models).columns == NAMES
    assert own_rows.with_rows(SuiteSection(rows=other), models).columns == {}
    own = {"instruction": "antwort", "output": "frage"}
    assert own_rows.with_rows(SuiteSection(rows=rows, columns=own), models).columns == own


def test_rows_that_cannot_be_asked_are_refused_in_one_line(rows, tmp_path, capsys):
    assert own_rows.read(["x"], [run(rows, holdout=0)], 160) is None
    assert "x held out no rows, so the embedded questions are asked" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"rows of x cannot be asked again: .*no such file.* rows=FILE"):
        own_rows.read(["x"], [run(str(tmp_path / "gone.jsonl"))], 160)
