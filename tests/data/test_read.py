"""How rows are split: by the question they begin with, whatever kind of row they are."""

from __future__ import annotations

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest

from mlx_posttrain.config import DataSection
from mlx_posttrain.convert import hub
from mlx_posttrain.data.jinja import as_jinja
from mlx_posttrain.data.read import read_conversations, read_preferences, read_rows, say_own_chat
from mlx_posttrain.data.split import opening, split_rows
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.rl import prompts
from tests.helpers import cli, write_jsonl


def pairs(prompt):
    answers = [f"answer {n}" for n in range(4)]
    return [
        {"prompt": prompt, "chosen": one, "rejected": two} for one, two in itertools.combinations(answers, 2)
    ]


def section(tmp_path, rows, **settings):
    return DataSection(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **settings)


KINDS = {
    "pairs": (lambda n: pairs(f"Question {n}?"), read_preferences),
    "duplicates": (
        lambda n: [{"instruction": f"Question {n}?", "output": f"answer {k}"} for k in range(6)],
        read_conversations,
    ),
    "other spelling": (
        lambda n: [{"instruction": q, "output": "a"} for q in (f"Question {n}?", f" question  {n}?\n") * 3],
        read_conversations,
    ),
    "later turns": (
        lambda n: [
            {
                "messages": [
                    {"role": role, "content": text}
                    for role, text in [
                        ("system", f"Be kind {k}."),
                        ("user", f"Question {n}?"),
                        ("assistant", "Yes."),
                        *[("user", "More?"), ("assistant", f"No {k}.")] * (k % 2),
                    ]
                ]
            }
            for k in range(6)
        ],
        read_conversations,
    ),
    "texts": (lambda n: [{"text": f"The story of {n}."}] * 6, read_conversations),
    "labelled": (
        lambda n: [
            {"prompt": f"Question {n}?", "completion": f"answer {k}", "label": k < 3} for k in range(6)
        ],
        read_rows,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holdout", [60, 0.1])
def test_no_question_is_on_both_sides(kind, holdout, tmp_path, capsys):
    make, read = KINDS[kind]
    rows = [row for n in range(100) for row in make(n)]
    data = section(tmp_path, rows, holdout=holdout)
    train, held_out = split_rows(data, 0, read)
    assert (len(train), len(held_out)) == (540, 60)
    assert not {opening(row) for row in train} & {opening(row) for row in held_out}
    assert len({opening(row) for row in held_out}) == 10
    told = "60 of 600 rows held out, 10 of 100 questions; no question is on both sides; "
    assert told + "500 rows repeat a question\n" in capsys.readouterr().err


def test_one_repeated_question_is_said(tmp_path, capsys):
    rows = [{"question": question, "answer": "x"} for question in ("a", "b", "c", " A")]
    split_rows(section(tmp_path, rows, holdout=1), 0, read_rows)
    assert capsys.readouterr().err.endswith("no question is on both sides; 1 row repeats a question\n")


def test_prompts_of_rollouts_are_split_alike(tmp_path):
    rows = [row for n in range(20) for row in pairs(f"Question {n}?")]
    train, held_out = prompts.read(
        section(tmp_path, rows, holdout=12), load_tokenizer(hub.resolve("tiny")), 512, 16, 0
    )
    assert len(held_out) == 12
    assert not {prompt.tokens for prompt in train} & {prompt.tokens for prompt in held_out}


def test_distinct_questions_give_the_exact_number(tmp_path, capsys):
    rows = [{"instruction": f"Question {n}?", "output": "a"} for n in range(50)]
    train, held_out = split_rows(section(tmp_path, rows, holdout=7), 3, read_conversations)
    assert (len(train), len(held_out)) == (43, 7) and "held out" not in capsys.readouterr().err


def test_questions_too_large_for_what_is_wanted(tmp_path, capsys):
    """Groups of 5, 4 and 3 rows and 2 wanted: the smallest is held out; one alone cannot be."""
    rows = [
        {"instruction": q, "output": f"{k}"} for q, n in zip("ABC", (5, 4, 3), strict=True) for k in range(n)
    ]
    train, held_out = split_rows(section(tmp_path, rows, holdout=2), 0, read_conversations)
    assert {opening(row) for row in held_out} == {"c"} and len(train) == 9
    train, held_out = split_rows(section(tmp_path, rows[:5], holdout=2), 0, read_conversations)
    assert len(train) == 5 and held_out == []
    assert "all rows begin with the same question" in capsys.readouterr().err


def test_rows_that_ask_nothing_are_told_apart_by_their_text(tmp_path):
    rows = [{"prompt": "", "completion": f"Text {n}."} for n in range(10)]
    train, held_out = split_rows(section(tmp_path, rows, holdout=3), 0, read_conversations)
    assert (len(train), len(held_out)) == (7, 3)


def test_a_given_split_is_kept_and_what_it_shares_is_printed(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"instruction": f"Q{n}?", "output": "a"} for n in range(10)])
    write_jsonl(folder / "test.jsonl", [{"instruction": f"Q{n}?", "output": "b"} for n in range(7, 12)])
    data = DataSection(source=str(folder), eval_split="test")
    train, held_out = split_rows(data, 0, read_conversations)
    assert (len(train), len(held_out)) == (10, 5)
    assert "3 of 5 rows of the split 'test' begin with a question that is also trained on" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("split", ["test", "training"])
def test_a_file_without_the_split_holds_rows_out(split, tmp_path, capsys):
    rows = [{"instruction": f"Question {n}?", "output": "a"} for n in range(20)]
    data = section(tmp_path, rows, eval_split=split, holdout=5)
    train, held_out = split_rows(data, 0, read_conversations)
    assert (len(train), len(held_out)) == (15, 5)
    assert {opening(row) for row in train}.isdisjoint(opening(row) for row in held_out)
    assert "data.eval_split" in capsys.readouterr().err


OWN_CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}assistant: "


@pytest.mark.parametrize(
    "words",
    ["demo_sft", "demo_dpo", "09_kto data.source=embedded/preferences", "10_grpo data.source=embedded/tasks"],
)
def test_a_models_own_chat_template_is_pointed_at_where_it_is_not_used(words, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("tiny"), folder)
    file = folder / "tokenizer_config.json"
    plain = json.loads(file.read_text())
    name, *settings = words.split()
    settings += [f"model={folder}", "data.limit=12", "data.template=instruction"]
    told = "this model has a chat template of its own; data.template=chat uses it\n"

    def data(template, *more):
        file.write_text(json.dumps(plain | {"chat_template": template} if template else plain))
        assert cli("data", name, *settings, *more, "--rows", "0") == 0
        return capfd.readouterr().err.count(told)

    assert data(OWN_CHAT) == 1
    assert data(OWN_CHAT, "data.template=chat") == data(None) == data(as_jinja("alpaca", "Be kind.")) == 0


def test_plain_text_needs_no_chat_template(tmp_path, capsys):
    tokenizer = SimpleNamespace(chat_template=OWN_CHAT)
    data = section(tmp_path, [{"text": "a"}])
    say_own_chat(data, tokenizer, templated=False)
    assert capsys.readouterr().err == ""
    say_own_chat(data, tokenizer, templated=True)
    assert capsys.readouterr().err.startswith("this model has a chat template")


@pytest.mark.parametrize(
    ("row", "settings", "advised"),
    [
        ({"prompt": "q", "reply": "a"}, {}, "name its column: data.columns='{response: reply}', or"),
        ({"prompt": "q", "x": "a"}, {}, "name its column: data.columns='{response: your_column}', or"),
        (
            {"city": "Turin", "ask": "q", "reply": "a"},
            {"prompt": "From {city}: {ask}", "columns": {"answer": "reply"}},
            "with data.prompt, name its column: data.columns='{response: reply}', or",
        ),
    ],
)
def test_prompts_without_an_answer_are_told_how_to_name_it(tmp_path, row, settings, advised):
    data = section(tmp_path, [row] * 2, **settings)
    with pytest.raises(UserError, match="no answer to imitate; ") as raised:
        read_conversations(data, split="train", limit=None, seed=0)
    assert advised in str(raised.value) and len(str(raised.value)) < 400
    if "your" not in advised:
        told = data.model_copy(update={"columns": {"response": "reply"}})
        rows = read_conversations(told, split="train", limit=None, seed=0)
        assert [turn.content for turn in rows[0].turns] == [(settings and "From Turin: q") or "q", "a"]
        assert rows[0].templated


def test_prompts_whose_columns_seem_to_be_pairs_are_told_how_to_name_them(tmp_path):
    data = section(tmp_path, [{"prompt": "q", "good": "a", "bad": "b"}])
    with pytest.raises(UserError, match=r"rename with data\.columns='\{chosen: good, rejected: bad\}'$"):
        read_preferences(data, split="train", limit=None, seed=0)
    data = section(tmp_path, [{"prompt": "q", "x": "a"}])
    with pytest.raises(UserError, match=r"or chosen and rejected dialogues$"):
        read_preferences(data, split="train", limit=None, seed=0)
