"""Rows to records: formats detected by their columns, odd values, and rows that are dropped or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_posttrain.data.formats import Dropped, detect, fill_prompts, parse, parse_rows
from mlx_posttrain.data.messages import TOOL_CALLS
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError


def U(text: str) -> Turn:
    return Turn("user", text)


def A(text: str) -> Turn:
    return Turn("assistant", text)


def S(text: str) -> Turn:
    return Turn("system", text)


def fault(call: Callable, *args: object, **kwargs: object) -> str:
    with pytest.raises(UserError) as e:
        call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "input", "output", "text"], "alpaca"),
        (["instruction", "input", "prompt", "response"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["prompt", "response", "id"], "prompt_completion"),
        (["messages", "prompt"], "messages"),
        (["conversations"], "messages"),
        (["text", "label"], "text"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["question", "chosen", "rejected", "system"], "preference"),
        (["instruction", "output", "chosen", "rejected"], "preference"),
        (["chosen", "rejected"], "hh"),
        (["prompt", "completion", "label"], "labelled"),
        (["question", "thinking", "answer", "response"], "reasoning"),
    ],
)
def test_detect(columns: list, expected: str) -> None:
    assert detect(columns) == expected
    assert detect(reversed(columns)) == expected


NEITHER = "question_answer (lacks question|query, answer|response|reference_answer)"


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [
        (["question", "reply"], "question_answer (lacks answer|response|reference_answer), "),
        (["promt", "completion_"], "prompt_completion (lacks prompt, completion|response), "),
        (["Instructions", "outputs"], "alpaca (lacks instruction, output|response), "),
        (["input", "target_text"], "input_output (lacks output|targets|target), "),
        (["message"], "messages (lacks messages|conversations|conversation), "),
        (
            ["chosen"],
            "hh (lacks rejected), preference (lacks "
            "prompt|question|instruction|input|trajectory|conversations, rejected), ",
        ),
        (["review", "stars"], f"{NEITHER}, messages (lacks "),
        ([], f"{NEITHER}, messages (lacks "),
    ],
)
def test_the_error_for_unknown_columns_names_the_nearest_formats(columns, nearest) -> None:
    with pytest.raises(UserError) as raised:
        detect(columns)
    message = str(raised.value)
    found = ", ".join(columns) or "(none)"
    assert message.startswith(f"columns {found} match no format; nearest: {nearest}")
    assert "; rename with data.columns='{" in message and message.endswith("docs/data.md lists all formats")
    assert len(message) < 400 and message.count("(lacks") == 3
    rows = [dict.fromkeys(columns, "a")]
    assert fault(parse_rows, rows, source="x.jsonl").startswith(f"x.jsonl: columns {found} match no")


@pytest.mark.parametrize(
    ("columns", "given", "mended"),
    [
        (["Question", "Antwort", "topic"], {}, "{answer: your_column}"),
        (["Question", "Antwort"], {}, "{answer: Antwort}"),
        (["Frage", "Antwort"], {"question": "Frage"}, "{question: Frage, answer: Antwort}"),
        (["chosen", "id: x"], {}, "{rejected: your_column}"),
        (["review", "stars"], {}, "{question: your_question, answer: your_answer}"),
        (["customer_question", "agentReply", "id"], {}, "{question: customer_question, answer: agentReply}"),
        (["prompts", "completions_1"], {}, "{question: prompts, answer: completions_1}"),
        (["user_input", "input_length", "reply"], {}, "{question: user_input, answer: reply}"),
        (["good_answer", "bad_answer", "ask"], {}, "{question: ask, answer: your_answer}"),
    ],
)
def test_the_error_for_unknown_columns_names_the_files_columns_and_what_mends_it(columns, given, mended):
    rows = [dict.fromkeys(columns, "a")]
    message = fault(parse_rows, rows, columns=given, source="x.csv")
    assert message.startswith(f"x.csv: columns {', '.join(columns)} match no format; nearest: ")
    assert f"; rename with data.columns='{mended}'; " in message
    if "your" not in mended:
        (row,) = parse_rows(rows, columns=yaml.safe_load(mended))[0]
        assert row.turns == (U("a"), A("a"))


@pytest.mark.parametrize(
    ("wants", "columns", "mended"),
    [
        ("pairs", ["instruction", "good", "bad"], "{chosen: good, rejected: bad}"),
        ("pairs", ["ask", "winner", "loser"], "{prompt: ask, chosen: winner, rejected: loser}"),
        ("pairs", ["winner", "said"], "{prompt: your_prompt, chosen: your_chosen, rejected: your_rejected}"),
        ("pairs", ["preferred", "other"], "{chosen: preferred, rejected: other}"),
        ("pairs", ["a", "b", "c"], "{prompt: your_prompt, chosen: your_chosen, rejected: your_rejected}"),
        ("prompts", ["customer_question", "reply", "id"], "{prompt: customer_question}"),
        ("prompts", ["a", "b"], "{prompt: your_column}"),
        ("labels", ["input", "reply", "liked"], "{prompt: input, completion: reply, label: liked}"),
        ("labels", ["prompt_", "response", "thumbs_up"], "{prompt: prompt_, label: thumbs_up}"),
    ],
)
def test_the_error_for_unknown_columns_offers_what_the_method_needs(wants, columns, mended) -> None:
    message = fault(parse_rows, [dict.fromkeys(columns, "a")], source="x.csv", wants=wants, setting="columns")
    assert f"; rename with columns='{mended}'; " in message and len(message) < 250
    if "your" not in mended and "prompt" in mended:
        row = dict(zip(columns, ("a", "b", "1"), strict=True))
        assert parse_rows([row], columns=yaml.safe_load(mended))[0]


def test_alpaca() -> None:
    row = {"instruction": " Add.\r\n", "input": "2 and\r\n3 ", "output": "5\n", "id": 7}
    assert parse(row, "alpaca") == Conversation((U("Add.\n\n2 and\n3"), A("5")), extra={"id": 7})
    for none in ("", None, "<noinput>", "No input", " N/A "):
        assert parse({**row, "input": none}, "alpaca").turns[0] == U("Add.")
    assert parse({"instruction": None, "input": "x", "response": "y"}, "alpaca").turns == (U("x"), A("y"))
    # the prompt and response columns that many such files carry as well
    both = {"instruction": "Add.", "input": "1", "prompt": "Add.\n\n1", "response": "2"}
    assert parse(both, "alpaca") == Conversation((U("Add.\n\n1"), A("2")), extra={"prompt": "Add.\n\n1"})


def test_numbers_are_text_and_other_types_name_the_row() -> None:
    rows = [{"question": 12, "answer": 5}, {"question": "a", "answer": 2.5}]
    records, dropped = parse_rows(rows)
    assert [r.turns for r in records] == [(U("12"), A("5")), (U("a"), A("2.5"))]
    assert not dropped
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": ["a"]}]
    assert fault(parse_rows, rows, source="f.csv") == "f.csv, row 2: column 'answer' must be text, found list"
    assert "found bool" in fault(parse_rows, [{"text": True}])


def test_empty_rows_are_dropped_and_counted() -> None:
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": " \n"},
        {"instruction": "a", "output": None},
        {"instruction": "a"},
        {"instruction": "", "output": "b"},
        {"instruction": "a", "output": float("nan")},
    ]
    records, dropped = parse_rows(rows)
    assert len(records) == 1
    assert dropped == {"an empty answer": 4, "an empty prompt": 1}
    assert "none of the 5 rows can be used as alpaca (an empty answer: 4, an empty prompt: 1)" in fault(
        parse_rows, rows[1:], format="alpaca"
    )


def test_prompt_completion_and_text_are_kept_exactly() -> None:
    row = {"prompt": "The capital of France is", "completion": " Paris.\r\n", "n": 1}
    assert parse(row, "prompt_completion") == Conversation(
        (U(row["prompt"]), A(row["completion"])), templated=False, extra={"n": 1}
    )
    assert parse({"prompt": None, "completion": "x"}, "prompt_completion").turns == (U(""), A("x"))
    assert parse({"text": " a\n"}, "text") == Conversation((A(" a\n"),), templated=False)
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert parse(chat, "prompt_completion") == Conversation((U("a"), A("b")))


def test_messages_and_sharegpt() -> None:
    messages = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    row = {"messages": [{"role": r, "content": c} for r, c in messages], "id": 1}
    # what follows the last answer is cut
    assert parse(row, "messages") == Conversation((S("s"), U("u"), A("a")), extra={"id": 1})
    share = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    assert parse(share, "messages").turns == (U("u"), A("a"))
    rows = [
        share,
        {"conversations": [{"from": "human", "value": "u"}]},
        {"conversations": [{"from": "tool", "value": "u"}]},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": None}]},
        {"conversations": None},
        {"conversations": []},
    ]
    _, dropped = parse_rows(rows)
    assert dropped == {"no assistant turn": 2, TOOL_CALLS: 1, "an empty answer": 1, "no messages": 1}
    assert "row 1: column 'messages' must be a list of messages, found str" in fault(
        parse_rows, [{"messages": "hi"}]
    )
    assert "row 1: a message in 'messages' must have role and content" in fault(
        parse_rows, [{"messages": [{"text": "x"}]}]
    )


def test_preference() -> None:
    row = {"prompt": "q ", "chosen": " yes", "rejected": "no", "score": 1}
    assert parse(row, "preference") == Preference((U("q"),), "yes", "no", extra={"score": 1})
    # UltraFeedback: the prompt once as text and again at the head of both lists
    listed = {
        k: [{"role": "user", "content": "q"}, {"role": "assistant", "content": k}]
        for k in ("chosen", "rejected")
    }
    assert parse({"prompt": "q", **listed}, "preference") == Preference((U("q"),), "chosen", "rejected")
    assert parse(listed, "hh") == Preference((U("q"),), "chosen", "rejected")
    asked = {"instruction": "a", "input": "b", "chosen": "1", "rejected": "2"}
    assert parse(asked, "preference") == Preference((U("a\n\nb"),), "1", "2")
    for change, reason in [
        ({"rejected": " yes "}, "chosen equals rejected"),
        ({"rejected": None}, "an empty answer"),
        ({"prompt": ""}, "an empty prompt"),
    ]:
        with pytest.raises(Dropped, match=reason):
            parse({**row, **change}, "preference")


def test_hh_splits_at_the_last_assistant_turn() -> None:
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Say Assistant: twice\n\nAssistant:"
    row = {"chosen": head + " One.\n\nTwo.", "rejected": head + " No."}
    prompt = (U("Hi"), A("Hello."), U("Say Assistant: twice"))
    assert parse(row, "hh") == Preference(prompt, "One.\n\nTwo.", "No.")
    crlf = {k: v.replace("\n", "\r\n") for k, v in row.items()}
    assert parse(crlf, "hh") == Preference(prompt, "One.\n\nTwo.", "No.")
    rows = [
        row,
        {"chosen": head + " a", "rejected": head.replace("Hi", "Ho") + " b"},
        {"chosen": head + " a", "rejected": head + " b\n\nHuman: more"},
        {"chosen": "plain text", "rejected": "other"},
        {"chosen": head + " same", "rejected": head + " same"},
        {"chosen": head, "rejected": head + " b"},
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
    ]
    records, dropped = parse_rows(rows)
    assert len(records) == 1
    assert dropped == {
        "chosen and rejected answer different prompts": 1,
        "a side of the pair does not end with an answer": 1,
        "not a Human/Assistant dialogue": 1,
        "chosen equals rejected": 1,
        "an empty answer": 1,
        "an empty prompt": 1,
    }


def test_labelled() -> None:
    for value, label in [(True, True), (0, False), ("1", True), ("False", False), (1.0, True)]:
        assert parse({"prompt": "p", "completion": "c", "label": value}, "labelled") == Labelled(
            (U("p"),), "c", label
        )
    assert "row 1: label must be true or false (1 or 0), found 'good'" in fault(
        parse_rows, [{"prompt": "p", "completion": "c", "label": "good"}]
    )
    with pytest.raises(Dropped, match="no label"):
        parse({"prompt": "p", "completion": "c", "label": None}, "labelled")


def test_question_answer_keeps_the_trace_and_the_answer() -> None:
    row = {"question": "q", "thinking": "t", "deepseek_reasoning": "r", "answer": "a"}
    extra = {"thinking": "t", "deepseek_reasoning": "r", "answer": "a"}
    assert parse(row, "question_answer") == Conversation((U("q"), A("a")), extra=extra)


def test_columns_map() -> None:
    rows = [{"query": "q", "output": "a", "instruction": "unused"}]
    records, _ = parse_rows(rows, columns={"instruction": "query"})
    assert records == [Conversation((U("q"), A("a")))]
    swapped, _ = parse_rows(
        [{"question": "a", "answer": "q"}], columns={"question": "answer", "answer": "question"}
    )
    assert swapped[0].turns == (U("q"), A("a"))
    message = fault(parse_rows, rows, columns={"instruction": "qery"})
    assert (
        "maps instruction to 'qery', which is not a column; did you mean 'query'? (there are query, output, "
        "instruction)" in message
    )


def test_named_formats() -> None:
    rows = [{"instruction": "i", "response": "r", "prompt": "p"}]
    assert parse_rows(rows, format="prompt_completion")[0][0].turns == (U("p"), A("r"))
    assert "format messages needs the column messages|conversations|conversation, found instruction" in fault(
        parse_rows, rows, format="messages"
    )
    assert "unknown data format 'alpacca'; did you mean 'alpaca'?" in fault(
        parse_rows, rows, format="alpacca"
    )
    assert "unknown data format" in fault(parse, rows[0], "nothing")


REAL = {  # (type, rows, dropped rows)
    "instruct/short-tasks.jsonl": (Conversation, 1100, 0),
    "instruct/self-instruct-seed.jsonl": (Conversation, 175, 0),
    "preference/hh-helpful-base.jsonl": (Preference, 1200, 10),
    "preference/polite-vs-rude.jsonl": (Preference, 1094, 0),
    "preference/persona-yes-no.jsonl": (Preference, 5000, 0),
    "reasoning/svamp.jsonl": (Conversation, 1000, 0),
    "reasoning/thinking-traces.jsonl": (Conversation, 153, 0),
    "sentiment/sentence-polarity.jsonl": (Conversation, 10662, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    from mlx_posttrain.data.sources import load_rows

    path = Path(__file__).parents[2].parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    kind, rows, lost = REAL[name]
    records, dropped = parse_rows(load_rows(str(path)), source=name)
    assert (len(records), sum(dropped.values())) == (rows - lost, lost)
    assert all(isinstance(r, kind) for r in records)


def test_one_side_of_a_pair_can_be_imitated():
    from mlx_posttrain.data.types import Conversation

    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(60)]
    (first, *_), dropped = parse_rows(rows, format="chosen", source="x")
    assert (
        isinstance(first, Conversation) and [t.content for t in first.turns] == ["p0", "good"] and not dropped
    )
    mixed, _ = parse_rows(rows, format="either", source="x")
    answers = [row.turns[-1].content for row in mixed]
    assert 15 < answers.count("good") < 45
    assert [
        row.turns[-1].content for row in parse_rows(rows[::-1], format="either", source="x")[0]
    ] == answers[::-1]
    dialogue = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}]
    assert [t.content for t in parse_rows(dialogue, format="chosen", source="x")[0][0].turns] == [
        "Hi",
        "Hello",
    ]
    assert type(parse_rows(rows, source="x")[0][0]).__name__ == "Preference"  # "chosen" is never detected


THOUGHT = "<think>\nhm\n</think>\n"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_under_a_key_of_its_own(key: str) -> None:
    def answer(**message: Any) -> Turn:
        row = {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | message]
        }
        return parse(row, "messages").turns[-1]

    assert answer(**{key: "hm"}) == answer(**{key: " <think>\nhm\n</think> "}) == A(THOUGHT + "a")
    # a thought that the content has is not written twice
    assert answer(**{key: "hm", "content": THOUGHT + "a"}) == A(THOUGHT + "a")
    for nothing in (None, "", "  ", False):
        assert answer(**{key: nothing}) == A("a")
    share = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: "hm"}]}
    assert parse(share, "messages").turns[-1] == A(THOUGHT + "a")
    asked = {"messages": [{"role": "user", "content": "q", key: "hm"}, {"role": "assistant", "content": "a"}]}
    assert parse(asked, "messages").turns[0] == U("q")


@pytest.mark.parametrize("thinking", ["hm", "<think>\nhm\n</think>", "<think>hm", "hm\n</think>"])
@pytest.mark.parametrize("answer", ["a", THOUGHT + "a"])
def test_marks_of_a_thought_are_not_doubled(thinking: str, answer: str) -> None:
    row = parse({"question": "q", "thinking": thinking, "answer": answer}, "reasoning")
    assert row.turns == (U("q"), A(THOUGHT + "a")) and row.extra["answer"] == "a"


def test_a_message_of_weight_0_is_not_trained() -> None:
    def turns(*weights: Any) -> list[bool]:
        messages = [{"role": "user", "content": "q"}]
        messages += [{"role": "assistant", "content": "a", "weight": w} for w in weights]
        return [turn.trained for turn in parse({"messages": messages}, "messages").turns]

    assert turns(0, 1, None, 0.0, 1.0) == [True, False, True, True, False, True]
    for wrong in (0.5, -1, "0", [0]):
        with pytest.raises(UserError, match=r"row 3: a message's weight must be 0 or 1"):
            parse_rows(
                [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 2
                + [{"messages": [{"role": "assistant", "content": "a", "weight": wrong}]}]
            )


def test_a_prompt_made_of_columns():
    rows = [{"target": 19, "nums": [49, 27, 3]}, {"target": 7, "nums": [1, 6], "{x}": 1}]
    found, _ = fill_prompts(rows, "Make {target} from {nums}: {target}!", "f.jsonl")
    assert [row["prompt"] for row in found] == ["Make 19 from [49, 27, 3]: 19!", "Make 7 from [1, 6]: 7!"]
    assert found[0]["nums"] == [49, 27, 3]  # for the reward
    with pytest.raises(UserError, match=r"names the column 'num'; did you mean 'nums'\?; the columns"):
        fill_prompts(rows, "{num}", "f.jsonl")
    with pytest.raises(UserError, match=r"data.prompt has no \{column\} in it"):
        fill_prompts(rows, "Make {} of it", "f.jsonl")


def test_columns_the_wrong_way_round_get_the_right_form() -> None:
    rows = [{"frage": "a", "antwort": "b"}]
    message = fault(parse_rows, rows, columns={"frage": "prompt", "antwort": "completion"})
    assert message.endswith("our name comes first, {prompt: frage, completion: antwort}")
    message = fault(parse_rows, rows, columns={"prompt": "nothing"})
    assert "maps prompt to 'nothing', which is not a column" in message


def test_a_prompt_from_columns_leaves_out_rows_without_text_in_them():
    rows = [{"a": value, "n": "x"} for value in (None, {"b": "c"}, float("nan"), [None], "", 0)] + [
        {"n": "x"}
    ]
    found, dropped = fill_prompts(rows, "Make {a} from {n}.", "f.jsonl")
    assert [row["prompt"] for row in found] == ["Make  from x.", "Make 0 from x."]
    assert dropped == {"the column 'a' of data.prompt has no text": 5}
    with pytest.raises(UserError, match=r"f\.jsonl: none of the 2 rows can be used: the column 'a' of data"):
        fill_prompts(rows[:2], "Make {a}", "f.jsonl")


def test_one_column_is_read_as_one():
    with pytest.raises(UserError, match=r"data\.columns maps both instruction and output to 'q'"):
        parse_rows([{"q": "a", "z": "c"}], columns={"instruction": "q", "output": "q"})


def test_messages_are_bounded_as_texts_are():
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "words" * 400_000 + "end"},
        ]
    }
    with pytest.raises(UserError, match="data, row 1: 2,000,004 characters, and a row has at most"):
        parse_rows([row])
