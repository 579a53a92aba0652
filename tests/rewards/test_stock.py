"""Stock rewards for what an answer says, against numbers worked by hand."""

from __future__ import annotations

import random

import pytest

from mlx_posttrain.rewards.stock import LONGEST_COMPARED
from tests.helpers import reward_scores as score


@pytest.mark.parametrize(
    "text, one, partial",
    [
        ("35 + 19 - 44", 0, 0.1),  # another value
        ("44 + 19 - 35", 1, 1),
        ("44 + 19 - 35 = 28", 1, 1),
        ("44 + 19 - 35 = 29", 0, 0.1),  # and says another one
        ("<think>44 - 19</think><answer>19 + (44 - 35)</answer>", 1, 1),
        ("44 + 19 - 35 + 35 - 35", 0, 0),  # a number twice
        ("28", 0, 0),  # none of the numbers
        ("44 - 16", 0, 0),
        ("44 + 19 - abs(35)", 0, 0),
        ("__import__('os').getcwd()", 0, 0),
        ("44 ** 19 - 35", 0, 0),
        ("", 0, 0),
        ("<think>44 + 19 - 35", 0, 0),
    ],
)
def test_countdown(text, one, partial):
    game = {"nums": [[44, 19, 35]], "target": [28]}
    assert score("countdown", [text], **game) == [one]
    assert score("countdown", [text], {"partial": 0.1}, **game) == [partial]


def test_countdown_uses_every_number_and_scores_only_games():
    texts = ["4 * 2", "4 * 2 * 1", "(4 + 4) / 1", "8"]
    columns = {
        "nums": [[4, 2, 1], [4, 2, 1], None, None],
        "numbers": [None, None, [4, 4, 1], [8]],
        "target": [8, 8, 8, None],
    }
    assert score("countdown", texts, **columns) == [0, 1, 1, None]
    assert score("countdown", texts) == [None] * 4


def test_ifeval():
    rows = {
        "instruction_id_list": [
            ["punctuation:no_comma", "startend:quotation"],
            ["punctuation:no_comma", "startend:quotation"],
            ["punctuation:no_comma"],
            ["language:response_language"],
            None,
        ],
        "kwargs": [[{}, {}], [{}, {}], None, [{}], None],
    }
    texts = ['"no commas"', "no commas", "<think>a, b</think>none", "x", "y"]
    assert score("ifeval", texts, **rows) == [1, 0, 1, None, None]
    assert score("ifeval", texts, {"by": "share"}, **rows) == [1, 0.5, 1, None, None]
    sure = 'Sure, here it is:\n"no commas"'
    one = {name: values[:1] for name, values in rows.items()}
    assert score("ifeval", [sure], **one) == [0] and score("ifeval", [sure], {"by": "loose"}, **one) == [1]
    repeat = {"instruction_id_list": [["combination:repeat_prompt"]], "kwargs": [[{}]]}
    assert score("ifeval", ["p and more"], **repeat) == [1]


def test_similarity():
    reference = {"reference_answer": ["The cat sat on the mat."]}
    # 6 words against 6; the, cat, on, mat in common twice the: 5; in the order the cat on the mat: 5
    assert score("similarity", ["The cat lay on the mat!"], **reference) == [pytest.approx(5 / 6)]
    # "on the mat sat the cat" has all 6 words; "on the mat" is the longest part in their order
    backwards = ["on the mat sat the cat"]
    assert score("similarity", backwards, **reference) == [1]
    assert score("similarity", backwards, {"metric": "rouge_l"}, **reference) == [pytest.approx(3 / 6)]
    # 2 of 2 words right, 2 of 6 found
    assert score("similarity", ["<think>no</think> cat mat"], **reference) == [pytest.approx(2 * 2 / 8)]
    recall = {"metric": "recall"}
    assert score("similarity", ["<think>no</think> cat mat"], recall, **reference) == [pytest.approx(2 / 6)]
    listed = ["a dog or the mat or the cat sat on it"]
    assert score("similarity", listed, recall, **reference) == [1]
    assert score("similarity", ["", "x"], reference_answer=["a b", None], answer=[None, 7]) == [0, 0]
    assert score("similarity", ["7", "x"], answer=[7, "..."]) == [1, None]
    assert score("similarity", ["x"]) == [None]


def table(ours, theirs):
    """The longest common subsequence by the textbook's table."""
    row = [0] * (len(theirs) + 1)
    for word in ours:
        above, row = row, [0]
        for j, other in enumerate(theirs):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


def test_rouge_l_is_that_of_a_table_and_of_the_package():
    rng = random.Random(0)
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for _ in range(100):
        ours, theirs = ([rng.choice("abcde") * 3 for _ in range(rng.randint(1, 90))] for _ in range(2))
        [found] = score(
            "similarity", [" ".join(ours)], {"metric": "rouge_l"}, reference_answer=[" ".join(theirs)]
        )
        assert found == pytest.approx(2 * table(ours, theirs) / (len(ours) + len(theirs)))
        assert found == pytest.approx(scorer.score(" ".join(theirs), " ".join(ours))["rougeL"].fmeasure)


def test_rouge_l_reads_the_beginning_of_a_long_text():
    text = " ".join(["a"] * LONGEST_COMPARED)
    found = score("similarity", [text + " b" * 9], {"metric": "rouge_l"}, reference_answer=[text])
    assert found == [1]
