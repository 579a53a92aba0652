"""Rules for outputs by their rows' columns.

Checked by hand and on every row of the shared data.
"""

from __future__ import annotations

import json
import operator
import re
import time

import pytest

from mlx_posttrain.data import tasks
from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards.answers import final_answer
from mlx_posttrain.rewards.numerals import last_number
from mlx_posttrain.rewards.verify import kind, verifiable, verify

GAME = {"numbers": [49, 27, 3], "target": 19}


@pytest.mark.parametrize(
    "row, name",
    [
        ({"checker": {"kind": "number", "value": 2}, "answer": "3"}, "checker"),
        ({"checker": None, "answer": "3"}, "number"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "answer": "3"}, "ifeval"),
        ({"instruction_id_list": ["language:response_language"], "kwargs": [{}]}, None),
        ({"instruction_id_list": [], "answer": "x"}, "text"),
        ({**GAME, "answer": "(49 - 3) - 27"}, "countdown"),
        ({"numbers": [], "target": 1}, None),
        ({"numbers": [1, "2"], "target": 1}, None),
        ({"numbers": [1, 2]}, None),
        ({"numbers": [1, 2], "target": float("nan")}, None),
        ({"target": "a text"}, None),
        ({"answer": "so 1 + 1 = 2, and that is all there is to it.\n#### 2"}, "number"),
        ({"answer": 5}, "number"),
        ({"answer": -0.5}, "number"),
        ({"answer": float("nan")}, None),
        ({"answer": None, "output": "12 apples"}, "number"),
        ({"output": "<think>1 and 2 and 3 and 4 and 5 and 6</think>\n7"}, "number"),
        ({"output": "3/4"}, "number"),
        ({"output": "3/4/2020"}, "text"),
        ({"output": r"2\sqrt{3}"}, "text"),
        ({"output": "4 m^2"}, "number"),
        ({"output": "CO2"}, "text"),
        ({"output": "COVID-19"}, "text"),
        ({"answer": "1990-1995"}, "text"),
        ({"answer": True}, "text"),
        ({"output": "one two three four five six seven eight"}, "text"),
        ({"output": "one two three four five six seven eight nine"}, None),
        ({"output": "In 1990 this and that happened here and there."}, None),
        ({"output": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"}, "text"),
        ({"output": " "}, None),
        ({"answer": "..."}, None),
        ({"answer": ["a", "b"]}, None),
        ({"prompt": "a", "chosen": "b"}, None),
        ({}, None),
    ],
)
def test_which_rule(row, name):
    assert kind(row) == name
    assert (verify(row, "x") is None) == (name is None)
    assert verifiable([row]) == ([row] if name else [])


@pytest.mark.parametrize(
    "answer, text, right",
    [
        ("1,000", "1000", True),
        ("1000", "It costs $1,000.", True),
        ("3", "The answer is 3.0.", True),
        ("3", "3.1", False),
        ("-5", "-5", True),
        ("-5", "5", False),
        ("5", "-5", False),
        ("-5", "The loss is -$5.00", True),
        ("2", "5-3=2", True),
        ("-3", "5-3", False),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("#### 72", "72 clips, not 73", False),
        ("48 + 24 = 72\n#### 72", "<think>It may be 71.</think>72", True),
        ("72", "<think>72</think>", False),
        ("72", "<think>It is 72", False),
        ("72", "72 <answer>71</answer>", False),
        ("72", "<answer>72</answer> of 100", True),
        ("72", "#### 72", True),
        ("72", r"It is \boxed{72} by step 3.", True),
        ("72", "", False),
        (72, "72", True),
        (1e20, "100,000,000,000,000,000,000", True),
        ("9007199254740993", "9007199254740992", False),
        ("2.20906e+07", "22,090,603", True),  # 1357 * 223 * 73
        ("2.20906e+07", "22090700", False),
        ("1.055e+06", "1054997", True),  # 967 * 1091
        ("1.055e+06", "1055400", False),
        ("22090600", "22090603", False),  # not rounded
        ("1.5e3", "9" * 5000, False),
        ("Paris", " paris. ", True),
        ("The Beatles", '"Beatles"', True),
        ("Paris", "The answer is Paris", False),
        ("Paris", "<answer>**Paris**</answer>", True),
        ("Paris", "London or Paris", False),
        ("red  and\nblue", "Red and blue!", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("A", "(a)", True),
        ("A", "The", False),
        ("A", "B", False),
        ("A", "", False),
        ("C++", "C", False),
        ("C", "C#", False),
        ("3/4", "3/4.", True),
        ("3/4", "1/4", False),
        ("3/4", "34", False),
        ("CO2", "NO2", False),
        (True, "true", True),
    ],
)
def test_numbers_and_texts(answer, text, right):
    assert verify({"answer": answer}, text) is right
    assert verify({"output": answer}, text) is right
    assert verify({"answer": answer, "output": "other"}, text) is right


@pytest.mark.parametrize(
    "text, right",
    [
        ("(49 - 3) - 27", True),
        ("49-27-3", True),
        ("49 - (27 + 3) = 19", True),
        ("49 - 27 - 3 = 19.", True),
        ("49 - 27 - 3.", True),
        ("-27 + 49 - 3", True),
        ("49 -\n27 - 3", True),
        ("<think>49 + 27</think>\n<answer>(49 - 3) - 27</answer>", True),
        ("<think>(49 - 3) - 27</think>", False),
        ("The answer is 49 - 27 - 3", False),
        ("49 - 27 - 3 = 20", False),
        ("49 - 27 - 3 = 19 = 19", False),
        ("49 - 27 - 3 =", False),
        ("49 - 27 - 3 = 1e999999999", False),
        ("19", False),  # not one of the numbers
        ("19 = 19", False),
        ("49 - 27 - 2 - 1", False),
        ("49 - 27", False),
        ("49 - 27 - 3 + 0", False),
        ("49 - 3 * 10", False),
        ("49 - 27 - 3 - (3 - 3)", False),  # 3 used thrice
        ("3 * 3 + (49 - 49) + 10", False),
        ("49 // 27 + 18", False),
        ("27 / (3 - 3)", False),
        ("3 ** 27", False),
        ("10**10**10", False),
        ("9" * 300, False),
        ("(" * 100 + "19" + ")" * 99, False),
        ("(" * 100000 + ")" * 100000, False),
        ("-" * 190 + "19", False),
        ("__import__('os').system('true')", False),
        ("3 if 1 else 2", False),
        ("(49)(27)", False),
        ("49, 27", False),
        ("4_9 - 27 - 3", False),
        ("0x31 - 27 - 3", False),
        ("049 - 27 - 3", False),
        ("49 ~ 27", False),
        ("49 - 27 - 3 # nothing", False),
        ("()", False),
        ("", False),
    ],
)
def test_countdown(text, right):
    start = time.process_time()
    assert verify(GAME, text) is right
    assert time.process_time() - start < 1


def test_countdown_is_exact_and_counts():
    third = {"numbers": [1, 3, 3], "target": 1}
    assert verify(third, "1 / 3 * 3")  # 0.333... * 3 in floats happens to be 1, the next does not
    assert verify({"numbers": [1, 49, 49], "target": 1}, "1 / 49 * 49")
    assert verify(third, "3 / 3") and not verify(third, "3 / 3 * 3 / 3")
    assert verify({"numbers": [8, 3, 8, 3], "target": 24}, "8 / (3 - 8 / 3)")
    assert verify({"numbers": [2.5, 2], "target": 5.0}, "2.5 * 2 = 5")
    assert verify({"numbers": [2, 5], "target": -3}, "2 - 5 = -3")
    assert not verify({"numbers": [7, 2], "target": 3}, "7 / 2")  # division is not rounded
    assert verify({"numbers": [0.1, 0.2], "target": 0.3}, "0.1 + 0.2")


def test_checker_and_ifeval():
    row = tasks.load("train", limit=1)[0]
    assert verify(row, row["output"]) is True and verify(row, "no such answer") is False
    with pytest.raises(UserError, match="unknown kind of checker"):
        verify({"checker": {"kind": "none"}}, "x")
    ids = ["punctuation:no_comma", "startend:end_checker", "language:response_language"]
    row = {
        "instruction_id_list": ids,
        "kwargs": [{}, {"end_phrase": "#### End"}, {"language": "de"}],
        "answer": "5",
    }
    assert verify(row, "<think>well, so</think>#### Title\n\n#### End") is True
    assert verify(row, "well, so #### End") is False
    assert verify(row, "<think>#### End") is False
    # the next rule that it has
    assert verify({"instruction_id_list": ids[2:], "kwargs": [{}], "answer": "5"}, "5") is True


def _rows(shared, name):
    path = shared / "data" / "reasoning" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {name}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "name, rule", [("gsm8k-train", "number"), ("svamp", "number"), ("countdown-train", "countdown")]
)
def test_every_shared_row_verifies_its_own_answer(shared, name, rule):
    rows = _rows(shared, name)
    assert rows and {kind(row) for row in rows} == {rule}
    assert [row for row in rows if not verify(row, row["answer"])] == []
    if rule == "number":
        # a tenth more is also wrong for the few that are rounded
        wrong = [f"#### {last_number(final_answer(row['answer'])).value * 11 / 10 + 1}" for row in rows]
    else:
        assert not any(0 in row["numbers"] for row in rows)
        wrong = [f"{row['answer']} + 0" for row in rows]
        assert [row for row in rows if not verify(row, row["response"])] == []
        assert [row for row in rows if verify({**row, "target": row["target"] + 1}, row["response"])] == []
    assert [row for row, text in zip(rows, wrong, strict=True) if verify(row, text)] == []


def test_svamp_equations_give_the_answers_of_their_rows(shared):
    # The equations are a second source of the data's answers, computed here and not by verify.
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    wrong = []
    rows = _rows(shared, "svamp")
    equations = [re.fullmatch(r"\( (\S+) ([-+*]) (\S+) \)", row["equation"]) for row in rows]
    for row, one in zip(rows, equations, strict=True):
        if one and not verify(row, f"It is {apply[one[2]](float(one[1]), float(one[3])):,.1f}."):
            wrong.append(row)
    assert sum(map(bool, equations)) > 600 and wrong == []
