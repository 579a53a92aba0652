"""Stock rewards for what an answer looks like, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import functions
from tests.helpers import reward_scores as score


@pytest.mark.parametrize(
    "text, think, r1",
    [
        ("<think>2 + 2</think>4", 1, 0),
        (" \n<think>2 + 2</think>\n\n4", 1, 0),
        ("<think>2 + 2</think> <answer>4</answer>\n", 1, 1),
        ("<think>2 + 2</think> so <answer>4</answer>", 1, 0),
        ("<think>2 + 2</think><answer>4</answer> I say", 1, 0),
        ("<think>2 + 2</think><answer> </answer>", 1, 0),
        ("<answer>4</answer><think>2 + 2</think>", 0, 0),
        ("<think>2 + 2</think>", 0, 0),
        ("<think> </think>4", 0, 0),
        ("<think>2 + 2", 0, 0),
        ("So <think>2 + 2</think>4", 0, 0),
        ("<think>a</think>4<think>b</think>4", 0, 0),
        ("<think>a<think>b</think>4", 0, 0),
        ("<think>a</think></think>4", 0, 0),
        ("</think>a<think>4", 0, 0),
        ("4", 0, 0),
        ("", 0, 0),
    ],
)
def test_format(text, think, r1):
    assert score("format", [text]) == score("format", [text], {"pattern": "think"}) == [think]
    assert score("format", [text], {"tags": ["think", "answer"]}) == [r1]


def test_format_of_an_answer_that_begins_inside_the_thought():
    texts = ["2 + 2</think>4", "<think>2 + 2</think>4", "2 + 2"]
    assert score("format", texts, {"opened": True}) == [1, 0, 0]
    assert score(
        "format", ["a</think><answer>b</answer>"], {"opened": True, "tags": ["think", "answer"]}
    ) == [1]


def test_format_by_a_regular_expression():
    texts = ["Answer: 4", "Answer: 4\n", "\nAnswer: 44", "x" * 20_001]
    assert score("format", texts, {"regex": r"Answer: \d"}) == [1, 0, 0, 0]
    assert score("format", texts, {"regex": r".*"}) == [1, 1, 1, 0]  # the longest that is tried has 20,000


def test_a_regular_expression_that_backtracks_without_end_meets_the_time_limit():
    bound = functions.bind(functions.load("format"), {"regex": "(a+)+b"}, "format")
    with pytest.raises(UserError, match="format: it took longer than"):
        functions.call(bound, ["p"], ["a" * 60], {}, "format", 0.2)


def test_length():
    ids = [[0] * 10, [0] * 64, [0] * 100]
    texts = ["7", "8", "7"]
    rows = {"completion_ids": ids, "answer": ["7"] * 3}
    # 54 tokens short, right on it, 36 too long
    exact = [-0.01 * 54, 0, -0.01 * 36]
    assert score("length", texts, {"target": 64, "alpha": 0.01}, **rows) == pytest.approx(exact)
    assert score("length", texts, {"target": 64}, completion_ids=ids) == pytest.approx([-0.0162, 0, -0.0108])
    # 0.01 * 54 + 0.5 is clipped; the second is wrong; 0.5 - 0.36
    most = [1.0, 0.0, 0.14]
    assert score("length", texts, {"form": "max", "target": 64, "alpha": 0.01}, **rows) == pytest.approx(most)
    of_rows = {**rows, "target_length": [20, None, 90]}
    assert score("length", texts, {"alpha": 0.01}, **of_rows) == [
        pytest.approx(-0.1),
        None,
        pytest.approx(-0.1),
    ]
    assert score("length", texts, {"form": "max", "target": 64}, completion_ids=ids) == [None] * 3
    # the argument is not the row's target, which decides what is right
    game = {"completion_ids": [[0] * 64] * 2, "numbers": [[3, 4]] * 2, "target": [7, 7]}
    assert score("length", ["3 + 4", "3 - 4"], {"form": "max", "target": 64}, **game) == [0.5, 0]


def test_cosine_length():
    ids = [[0] * n for n in (0, 50, 100, 0, 50, 25, 200)]
    texts = ["7", "7", "7", "8", "8", "7", "7"]
    rows = {"completion_ids": ids, "answer": ["7"] * 7}
    # from 2 to 1 where right, from -10 to 0 where wrong; half-way at half the length
    worked = [2, 1.5, -10, -10, -5, 1 + (1 + math.sqrt(0.5)) / 2, -10]
    assert score("length", texts, {"form": "cosine", "max_length": 100}, **rows) == pytest.approx(worked)
    own = {"form": "cosine", "max_length": 100, "right": [1, 0], "wrong": [-1, 0], "exceeded": -3}
    assert score("length", texts, own, **rows)[:5] == pytest.approx([1, 0.5, -3, -1, -0.5])
    # the row's own rule decides; without one there is no score
    game = {"completion_ids": [[0]] * 3, "numbers": [[3, 4], [3, 4], None], "target": [7, 7, None]}
    found = score("length", ["3 + 4", "4", "x"], {"form": "cosine", "max_length": 2}, **game)
    assert found == [pytest.approx(1.5), pytest.approx(-5), None]
    theirs = {"completion_ids": [[0]], "reference_answer": ["so 7"]}
    assert score("length", ["so 7"], {"form": "cosine", "max_length": 2}, **theirs) == [pytest.approx(1.5)]


def test_overlong():
    ids = [[0] * n for n in (0, 80, 85, 90, 100, 101, 500)]
    worked = [0, 0, -0.25, -0.5, -1, -1, -1]
    columns = {"completion_ids": ids}
    assert score("overlong", [""] * 7, {"max_length": 100}, **columns) == pytest.approx(worked)
    wider = score("overlong", [""] * 7, {"max_length": 100, "cache": 100}, **columns)
    assert wider == pytest.approx([0, -0.8, -0.85, -0.9, -1, -1, -1])


@pytest.mark.parametrize(
    "ids, n, share",
    [
        ([1, 2, 3, 4, 5], 2, 0),
        ([1, 2, 1, 2], 2, 2 / 4),  # the second 1 2
        ([1, 2, 1, 2, 1], 2, 3 / 5),  # then 2 1, which overlaps it
        ([7, 7, 7, 7], 2, 3 / 4),  # from the second 7 on
        ([7, 7, 7, 7], 1, 3 / 4),
        ([1, 2, 3, 1, 2, 3, 9, 1, 2, 3], 3, 6 / 10),
        ([1, 2], 2, 0),
        ([1], 2, 0),
        ([], 2, 0),
    ],
)
def test_repetition(ids, n, share):
    columns = {"completion_ids": [ids]}
    assert score("repetition", ["x"], {"n": n}, **columns) == [pytest.approx(-share)]
    assert score("repetition", ["x"], {"n": n, "penalty": -0.05}, **columns) == [pytest.approx(-0.05 * share)]


def test_json():
    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    }
    texts = [
        '{"name": "Ann", "age": 3}',
        '<think>{</think>\n```json\n{"name": "Ann"}\n```',
        '{"name": "Ann", "age": -1}',
        '{"name": "Ann", "size": 1}',
        '{"age": 3}',
        "[1, 2]",
        "Ann",
        '{"age": NaN}',
        "[" * 100_000,
    ]
    assert score("json", texts) == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert score("json", texts, {"json_schema": person}) == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    theirs = {"schema": [{"type": "array", "items": None}, '{"type": "object"}', None]}
    assert score("json", ["[]", "[]", "[]"], **theirs) == [1, 0, 1]


@pytest.mark.parametrize(
    "name, args, said",
    [
        ("format", {"patern": "think"}, "unknown key 'patern'; did you mean 'pattern'?"),
        ("format", {"pattern": "thought"}, "'pattern': must be 'think', not 'thought'"),
        ("format", {"pattern": "think", "tags": ["a"]}, "exclude each other"),
        ("format", {"regex": "(a"}, "is no regular expression: missing"),
        ("format", {"regex": "a", "opened": True}, "opened belongs to"),
        ("format", {"tags": ["<think>"]}, "tags.0"),
        ("format", {"tags": []}, "tags"),
        ("format", {"tags": ["a", "b", "a"]}, "give each name once"),
        ("length", {"target": "long"}, "'target': must be a whole number, not 'long'"),
        ("length", {"target": 0}, "'target': must be greater than or equal to 1, not 0"),
        ("length", {"form": "cosine"}, "needs max_length"),
        ("length", {"max_length": 9}, "max_length belongs to form cosine"),
        ("length", {"form": "cosine", "max_length": 9, "target": 9}, "target belongs to"),
        ("overlong", {}, "the key 'max_length' is missing"),
        ("overlong", {"max_length": 5, "cache": 6}, "cache 6 is longer than max_length 5"),
        ("repetition", {}, "the key 'n' is missing"),
        ("repetition", {"n": 3, "penalty": 1}, "'penalty'"),
        ("exact_answer", {"answer": 3}, "unknown key 'answer'"),
        ("json", {"json_schema": {"minimun": 1}}, "'minimun' is not understood; did you mean 'minimum'?"),
        ("json", {"json_schema": {"type": "int"}}, "type must be one of object, array"),
        ("json", {"json_schema": {"properties": {"a": {"items": 3}}}}, "schema.properties.a: items must be"),
        ("json", {"json_schema": {"minLength": "3"}}, "minLength must be a number"),
        (
            "json",
            {"json_schema": {"properties": {"a": 3}}},
            "schema.properties.a: a JSON schema is a mapping",
        ),
        ("python_tests", {}, r"args: \{allow: true\}"),
    ],
)
def test_arguments_are_checked_before_anything_is_scored(name, args, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")) as error:
        functions.bind(functions.load(name), args, name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_column_with_an_arguments_name_is_not_the_argument():
    columns = {"completion_ids": [[0] * 3], "target": [99], "alpha": [9]}
    assert score("length", ["x"], {"target": 5}, **columns) == [pytest.approx(-0.0006)]
