"""Rows as other people's data sets have them: each gives the turns that it means, without a setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_posttrain.config import DataSection
from mlx_posttrain.data.formats import ORDER, detect, parse_all, parse_rows
from mlx_posttrain.data.messages import TOOL_CALLS
from mlx_posttrain.data.read import read_rows
from mlx_posttrain.data.types import Conversation, Labelled, Preference
from mlx_posttrain.errors import UserError
from tests.helpers import write_jsonl

Q, A = ("user", "q"), ("assistant", "a")
S = ("system", "s")
THOUGHT = "<think>\nhm\n</think>\na"
MARKED = (
    "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n\n<|end_of_solution|>"
)


def turns(row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """The turns of one row of a detected format."""
    ((record, *_), dropped) = parse_rows([row], **options)
    assert not dropped
    found = record.turns if isinstance(record, Conversation) else record.prompt
    return [(turn.role, turn.content) for turn in found]


def share(*said: tuple[str, str], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in said], **columns}


def chat(*said: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in said], **columns}


# Alternative columns, by value


@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan")])
@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"instruction": "q", "output": "a"}, "response"),
        ({"instruction": "q", "response": "a"}, "output"),
        ({"prompt": [{"role": "user", "content": "q"}], "response": "a"}, "completion"),
        (chat(("user", "q"), ("assistant", "a")), "conversations"),
        (share(("human", "q"), ("gpt", "a")), "messages"),
        ({"question": "q", "response": "a"}, "answer"),
        ({"problem": "q", "answer": "a"}, "solution"),
        # a whole format whose columns are empty
        ({"instruction": "q", "output": "a", "rejected": None}, "chosen"),
        ({"question": "q", "answer": "a", "messages": []}, "conversations"),
    ],
)
def test_of_alternative_columns_the_one_with_a_value_is_read(row, empty, nothing):
    assert turns({empty: nothing, **row}) == turns({**row, empty: nothing}) == [Q, A]


def test_alternatives_are_chosen_row_by_row():
    rows = [
        {"instruction": "q", "output": None, "response": "1"},
        {"instruction": "q", "output": "2", "response": ""},
        {"instruction": "q", "output": "3", "response": "not this"},
        {"instruction": "q", "output": "", "response": None},
    ]
    records, dropped = parse_rows(rows)
    assert [r.turns[-1].content for r in records] == ["1", "2", "3"] and dropped == {"an empty answer": 1}
    pairs = [
        {"prompt": None, "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"},
    ]
    assert [r.prompt[0].content for r in parse_rows(pairs)[0]] == ["q", "p"]
    scored = {"prompt": "q", "completions": None, "responses": ["a", "b"], "scores": [2, 1]}
    (pair,), _ = parse_rows([scored])
    assert (pair.chosen, pair.rejected) == ("a", "b")


def test_keys_of_a_message_are_chosen_by_value():
    message = {"role": None, "from": "human", "content": None, "value": "q"}
    assert turns({"messages": [message, {"role": "assistant", "content": "a"}]}) == [Q, A]


# System prompts and histories in columns of their own


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"question": "q", "answer": "a"},
        {"problem": "q", "solution": "a"},
        {"input": "q", "output": "a"},
        share(("human", "q"), ("gpt", "a")),
        chat(("user", "q"), ("assistant", "a")),
        {"from": ["human", "gpt"], "value": ["q", "a"]},
        {"question": "q", "thinking": "t", "answer": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", **{k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}},
        {k: f"\n\nHuman: q\n\nAssistant: {k}" for k in ("chosen", "rejected")},
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q"},
        {"instruction": "q", "completions": [{"response": "a", "score": 2}, {"response": "b", "score": 1}]},
    ],
)
def test_a_system_prompt_in_its_own_column(row, name):
    plain = turns(row)
    parsed = parse_all([{**row, name: " s\r\n"}])
    assert turns({**row, name: "s"}) == [S, *plain] and plain[0] == Q
    assert parsed.unread == [] and name not in parsed.records[0].extra
    for nothing in (None, "", "  "):
        assert turns({**row, name: nothing}) == plain


def test_a_system_turn_is_not_doubled():
    row = chat(("system", "own"), ("user", "q"), ("assistant", "a"), system="s")
    assert turns(row) == [("system", "own"), Q, A]
    assert parse_all([row]).unread == ["system"]
    assert turns({"prompt": row["messages"][:2], "completion": "a", "label": 1, "system": "s"}) == [
        ("system", "own"),
        Q,
    ]


@pytest.mark.parametrize("form", [lambda h: h, json.dumps], ids=["list", "text"])
@pytest.mark.parametrize(
    "history",
    [
        [["q1", "a1"], ["q2", "a2"]],
        [
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1"},
            {"from": "human", "value": "q2"},
            {"from": "gpt", "value": "a2"},
        ],
    ],
)
def test_a_history_becomes_earlier_turns(history, form):
    before = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    for row, last in (
        ({"instruction": "q", "input": "", "output": "a"}, [Q, A]),
        ({"question": "q", "answer": "a"}, [Q, A]),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, [Q]),
    ):
        whole = {**row, "history": form(history), "system": "s"}
        assert turns(whole) == [S, *before, *last]
        assert parse_all([whole]).unread == []
        assert turns({**row, "history": form([])}) == turns({**row, "history": None}) == last


def test_a_history_of_another_kind():
    row = {"instruction": "q", "output": "a"}
    parsed = parse_all([{**row, "history": "we spoke before"}])
    assert parsed.unread == ["history"] and parsed.records[0].extra == {"history": "we spoke before"}
    with pytest.raises(UserError, match=r"row 1: column 'history' must be a list of pairs"):
        parse_rows([{**row, "history": [["q1", "a1", "more"]]}])
    _, dropped = parse_rows([row, {**row, "history": [["q1", None]]}])
    assert dropped == {"an empty turn in the history": 1}


def test_columns_that_nothing_reads_are_named_once(tmp_path: Path, capsys):
    rows = [{"instruction": "q", "output": None, "response": "a", "lang": "en", "id": n} for n in range(30)]
    rows[3]["tools"] = "[]"
    data = DataSection(source=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    read_rows(data, split="train", limit=None, seed=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "does not read" in line]
    assert lines == [f"{data.source}: read as alpaca; columns it does not read: lang, id, tools"]
    # what the recipe names is meant, and the embedded data are the project's own
    for change in ({"columns": {"language": "lang", "number": "id", "t": "tools", "o": "output"}},):
        read_rows(data.model_copy(update=change), split="train", limit=None, seed=0)
        assert "does not read" not in capsys.readouterr().err
    read_rows(DataSection(source="embedded/tasks"), split="train", limit=9, seed=0)
    assert "does not read" not in capsys.readouterr().err


def test_many_columns_are_named_in_one_short_line(tmp_path: Path, capsys):
    row = {"text": "a", **{f"column {n}": 1 for n in range(40)}, "x" * 400: 1, "a\nb": 1, " ": 1}
    data = DataSection(source=str(write_jsonl(tmp_path / "rows.jsonl", [row])))
    read_rows(data, split="train", limit=None, seed=0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "does not read" in line]
    assert line.endswith("column 10, column 11 and 31 more")


# Tool calls


CALL = {"id": "c1", "type": "function", "function": {"name": "colour", "arguments": "{}"}}


def calling(**message: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "q"},
        message,
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "a"},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        calling(role="assistant", content=None, tool_calls=[CALL]),
        calling(role="assistant", content="Let me see.", tool_calls=[CALL]),
        calling(role="assistant", tool_calls=[CALL]),
        calling(role="assistant", content=None, function_call={"name": "colour", "arguments": "{}"}),
        calling(role="tool", content="red", tool_call_id="c1"),
        calling(role="function", name="colour", content="red"),
        calling(role="assistant", content=[{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]),
        calling(role="user", content=[{"type": "tool_result", "tool_use_id": "c1", "content": "red"}]),
        calling(**{"from": "function_call", "value": "{}"}),
        calling(**{"from": "observation", "value": "red"}),
        calling(**{"from": "Tool", "value": "red"}),
        # the last answer, and beside a role that nobody has
        [
            *calling(role="narrator", content="x"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
    ],
)
def test_tool_calls_are_dropped_for_one_reason_in_every_format(messages):
    sound = {"role": "assistant", "content": "b"}
    rows = {
        "messages": {"messages": messages},
        "prompt_completion": {"prompt": messages[:-1], "completion": messages[-1:]},
        "preference": {"prompt": "q", "chosen": messages, "rejected": [*messages[:-1], sound]},
        "hh": {"chosen": messages, "rejected": [*messages[:-1], sound]},
        "labelled": {"prompt": messages[:-1], "completion": messages[-1:], "label": True},
        "prompt": {"prompt": messages[:-1]},
        "chosen": {"chosen": messages, "rejected": "b"},
    }
    for format, row in rows.items():
        if format == "prompt" and messages[-1].get("tool_calls"):
            continue  # the call stands in the answer, which this format does not have
        good = {name: [messages[0], sound] if isinstance(row[name], list) else "x" for name in row}
        good |= {"label": True} if "label" in row else {}
        if format in ("preference", "hh"):
            good["rejected"] = [messages[0], {**sound, "content": "c"}]
        if format in ("prompt", "labelled", "prompt_completion"):
            good["prompt"] = [messages[0]]
        if format == "labelled":
            good["completion"] = "b"
        records, dropped = parse_rows([row, good, row], format=format)
        assert len(records) == 1 and dropped == {TOOL_CALLS: 2}, format


def test_no_tool_is_called_by_an_empty_list():
    row = chat(("user", "q"), ("assistant", "a"))
    for nothing in (None, [], "[]", {}):
        row["messages"][1]["tool_calls"] = nothing
        assert turns(row) == [Q, A]


# Formats


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("human", "gpt"),
        ("user", "assistant"),
        ("Human", "GPT"),
        ("USER", "chatgpt"),
        ("prompter", "bing"),
        ("human", "bard"),
        ("human", "model"),
        (" user ", "Bot"),
    ],
)
def test_names_of_roles(user, assistant):
    for system in ("system", "developer", "System"):
        said = ((system, "s"), (user, "q"), (assistant, "a"))
        assert turns(share(*said)) == turns(chat(*said)) == [S, Q, A]


def test_content_in_parts():
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    assert turns(chat(("user", parts("q")), ("assistant", parts("a")))) == [Q, A]
    assert turns(chat(("user", parts("one ", "two")), ("assistant", "a")))[0] == ("user", "one two")
    thinking = [{"type": "thinking", "thinking": "hm"}, *parts("a")]
    assert turns(chat(("user", "q"), ("assistant", thinking))) == [Q, ("assistant", THOUGHT)]
    image = [{"type": "image_url", "image_url": {"url": "x"}}, *parts("q")]
    rows = [chat(("user", image), ("assistant", "a")), chat(("user", "q"), ("assistant", "a"))]
    assert parse_rows(rows)[1] == {"a message with something other than text, such as an image": 1}
    with pytest.raises(UserError, match="row 1: a part of a message must be an object"):
        parse_rows([chat(("user", [7]), ("assistant", "a"))])


def test_openthoughts_and_stratos():
    system = (
        "Answer as <|begin_of_thought|> {steps} <|end_of_thought|> <|begin_of_solution|> {it} "
        "<|end_of_solution|>"
    )
    row = share(("user", "q"), ("assistant", MARKED), system=system)
    # the system prompt asks for the marks that the answer has
    asked = ("system", "Answer as <think> {steps} </think>  {it}")
    assert turns(row) == [asked, Q, ("assistant", THOUGHT)]
    assert turns(chat(("system", system), ("user", "q"), ("assistant", MARKED)))[0] == asked
    assert turns({"instruction": "q", "output": MARKED})[-1] == ("assistant", THOUGHT)
    unfinished = [share(("user", "q"), ("assistant", "<|begin_of_thought|>\n\nhm, hm")), row]
    assert parse_rows(unfinished)[1] == {"an empty answer": 1}
    # a text that speaks of the marks is no thought
    about = "They write <|begin_of_thought|> first."
    assert turns(share(("user", "q"), ("gpt", about)))[-1] == ("assistant", about)


def test_openr1():
    right, wrong = "<think>\nhm\n</think>\na", "<think>\noh\n</think>\nb"
    row = {
        "problem": "q",
        "solution": "the whole way",
        "answer": "a",
        "generations": [wrong, right],
        "correctness_math_verify": [False, True],
        "correctness_llama": None,
        "is_reasoning_complete": [True, True],
    }
    (record,), _ = parse_rows([row])
    assert turns(row) == [Q, ("assistant", THOUGHT)] and record.extra["answer"] == "a"
    judged = {**row, "correctness_math_verify": [False, False], "correctness_llama": [True, False]}
    assert turns(judged)[-1] == ("assistant", wrong)
    del row["correctness_math_verify"]
    assert turns(row)[-1] == ("assistant", wrong)
    assert turns({**row, "is_reasoning_complete": [False, True]})[-1] == ("assistant", right)
    nothing = [{**judged, "correctness_llama": [False, False]}, row]
    assert parse_rows(nothing)[1] == {"no generation that is right and whole": 1}
    # with the messages that the data set made of it
    assert turns({**row, **chat(("user", "q"), ("assistant", right))}) == [Q, ("assistant", right)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, [("user", "i\n\nc"), A]),
        ({"instruction": "i", "input": "", "output": "a", "system": "s"}, [S, ("user", "i"), A]),
        ({"system_prompt": "s", "question": "q", "response": "a", "id": "x"}, [S, Q, A]),
        ({"query": "q", "response": "a", "type": "x"}, [Q, A]),
        ({"problem": "q", "solution": "a", "level": "5"}, [Q, A]),
        ({"problem": "q", "solution": "a", "answer": "5"}, [Q, A]),
        ({"problem": "q", "solution": None, "answer": "a"}, [Q, A]),
        ({"input": "q", "output": "a"}, [Q, A]),
        ({"inputs": "q", "targets": "a"}, [Q, A]),
        ({"Instruction": "i", "Input": "x", "Output": "a"}, [("user", "i\n\nx"), A]),
        ({" Question ": "q", "ANSWER": "a"}, [Q, A]),
        ({"System Prompt": "s", "Question": "q", "Response": "a"}, [S, Q, A]),
        ({"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [Q, A]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, [Q, A]),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [Q, A]),
        ({"from": ["human", "gpt"], "value": ["q", "a"]}, [Q, A]),
        ({"role": ["user", "assistant"], "content": ["q", "a"]}, [Q, A]),
        ({"conversations": json.dumps(share(("human", "q"), ("gpt", "a"))["conversations"])}, [Q, A]),
    ],
)
def test_conversations_of_other_shapes(row, expected):
    assert turns(row) == expected


def test_pairs_of_other_shapes():
    sides = {"chosen": "a", "rejected": "b"}
    for row, expected in (
        ({"input": "q", **sides, "chosen-rating": 5}, [Q]),
        ({"system": "s", "input": "q", **sides, "generations": ["a", "b"]}, [S, Q]),
        ({"system": "s", "question": "q", **sides}, [S, Q]),
        ({"instruction": "i", "input": "x", **sides}, [("user", "i\n\nx")]),
        ({"prompt": "q", "prompt_id": "x", "messages": [], "score_chosen": 8.0, **sides}, [Q]),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b"}, [Q]),
    ):
        (pair,), _ = parse_rows([row])
        assert isinstance(pair, Preference) and (pair.chosen, pair.rejected) == ("a", "b")
        assert [(t.role, t.content) for t in pair.prompt] == expected
    texts = {
        k: json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": k}]) for k in sides
    }
    (pair,), _ = parse_rows([texts])
    assert (pair.chosen, pair.rejected, pair.prompt[0].content) == ("chosen", "rejected", "q")
    assert turns({"prompt": "q", **sides}, format="chosen") == [Q, A]
    assert turns({"instruction": "i", "input": "x", "system": "s", **sides}, format="chosen") == [
        S,
        ("user", "i\n\nx"),
        A,
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "solution": "a", "answer": "5"}, [Q, A]),  # LIMO
        ({"question": "q", "solution": None, "answer": "a"}, [Q, A]),
        ({"question": "q", "reference_answer": "a"}, [Q, A]),
        ({"text": "q", "code": "a", "test_list": ["assert f()"]}, [Q, A]),  # MBPP
        (
            {"question": "q", "choices": ["x", "y"], "answer": 1},
            [("user", "q\nA. x\nB. y"), ("assistant", "B")],
        ),
        ({"question": "q", "choices": ["x", "y"], "answer": "a"}, [Q, A]),
        ({"definition": "d", "inputs": "q", "targets": "a"}, [("user", "d\n\nq"), A]),
        ({"prompt": " q", "response": "a ", "source": "x", "system": "s"}, [S, Q, A]),  # GPT4All
        (chat(("user", "q"), ground_truth="5"), [Q]),  # RLVR
        ({"conversation": [{"from": "human", "value": "q"}]}, [Q]),
    ],
)
def test_questions_of_other_shapes(row, expected):
    assert turns(row) == expected and parse_rows([row])[0][0].templated


def test_what_stands_beside_a_question_stays_for_checkers():
    def extra(**row: Any) -> dict[str, Any]:
        return parse_rows([row])[0][0].extra

    assert extra(question="q", solution="a", answer="5")["answer"] == "5"
    assert extra(question="q", choices=["x", "y"], answer=0)["answer"] == "A"
    assert extra(text="q", code="a", test_list=["t"])["test_list"] == ["t"]
    verl = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "34"}}
    assert extra(**verl)["answer"] == "34" and extra(**verl, answer="1")["answer"] == "1"
    fits = {"question": "q", "choices": ["x", "y"], "answer": 1}
    assert parse_rows([fits, {**fits, "answer": 2}])[1] == {"an answer that numbers none of the choices": 1}
    # a text and how it goes on
    assert not parse_rows([{"prompt": " q", "completion": " a"}])[0][0].templated


def test_messages_that_somebody_answers_are_no_prompts():
    rows = [chat(("user", "q"), ("assistant", "a")), chat(("user", "q"))]
    records, dropped = parse_rows(rows)
    assert [len(r.turns) for r in records] == [2] and dropped == {"no assistant turn": 1}


def test_pairs_whose_prompt_is_a_conversation():
    sides = {"chosen": "a", "rejected": "b"}
    human = [{"from": "human", "value": "q"}]
    dialogue = "\n\nHuman: q0\n\nAssistant: a0\n\nHuman: q\n\nAssistant:"
    for row, expected in (
        ({"prompt": dialogue, "response": " a", **sides}, [("user", "q0"), ("assistant", "a0"), Q]),
        ({"trajectory": human, **sides}, [Q]),
        ({"conversations": human, **{k: {"from": "gpt", "value": v} for k, v in sides.items()}}, [Q]),
        ({"prompt": '["q"]', "chosen": '["a"]', "rejected": '["b"]'}, [Q]),
        (
            {"prompt": '["q0", "q"]', "chosen": '["a0", "a"]', "rejected": '["a0", "b"]'},
            [("user", "q0"), ("assistant", "a0"), Q],
        ),
    ):
        parsed = parse_all([row])
        (pair,) = parsed.records
        assert (pair.chosen, pair.rejected) == ("a", "b") and set(parsed.unread) <= {"response"}
        assert [(t.role, t.content) for t in pair.prompt] == expected
    good = {"prompt": '["q"]', "chosen": '["a"]', "rejected": '["b"]'}
    longer = {"prompt": '["q", "r"]', "chosen": '["a", "c"]', "rejected": '["b", "d"]'}
    others = [{**good, "chosen": "[null]"}, {**good, "prompt": '["q", "r"]'}, longer]
    assert parse_rows([good, *others])[1] == {
        "an empty turn": 1,
        "as many answers as questions are needed": 1,
        "chosen and rejected answer different prompts": 1,
    }
    # one text in brackets is a text
    assert parse_rows([{**good, "rejected": "b"}])[0][0].chosen == '["a"]'


def test_text_that_looks_like_a_list_stays_text():
    for text in ("[1, 2]", '["a"]', "[{}]", "[not json"):
        (pair,), _ = parse_rows([{"prompt": text, "chosen": text, "rejected": "b"}])
        assert (pair.prompt[0].content, pair.chosen) == (text, text)
    label = {"prompt": "q", "completion": "[1]", "label": True}
    assert parse_rows([label])[0] == [Labelled(parse_rows([label])[0][0].prompt, "[1]", True)]


def test_labelled_steps_are_named():
    row = {"prompt": "q", "completions": ["one", "two"], "labels": [True, False]}
    assert detect(row) == "stepwise" and "stepwise" in ORDER
    with pytest.raises(
        UserError, match=r"row 1: these rows are stepwise .* no method learns from labelled steps"
    ):
        parse_rows([row])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"from": "human", "value": "q"}, "row 1: each row is one message; give each conversation a row"),
        (
            {"messages": "[{'role': 'user', 'content': 'q'}]"},
            "row 1: column 'messages' must be a list of messages, found Python's notation; write it",
        ),
        ({"question": "q", "generations": "a"}, "row 1: column 'generations' must be a list of texts"),
    ],
)
def test_what_cannot_be_read_is_named(row, expected):
    with pytest.raises(UserError) as error:
        parse_rows([row])
    assert expected in str(error.value) and "\n" not in str(error.value)
