"""An output's final answer, and whether it is the same as a reference, against verdicts given by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_posttrain.rewards.answers import final_answer
from mlx_posttrain.rewards.stock import exact_answer
from mlx_posttrain.rewards.verify import verify

#: 200 answers, half of them right by hand (``right``). ``ours`` is our verdict where it differs by design,
#: for the reason in ``why``; ``math_verify`` is that of math-verify 0.9 where it differs.
PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(
    "text, answer",
    [
        (" 5 \n", "5"),
        ("<think>4</think>\n 5 ", "5"),
        ("4</think>5", "5"),  # a template that opens the thought in the prompt
        ("<think>1</think>2<think>3</think>4", "4"),
        ("<think>4", ""),
        ("<think>1</think>2<think>3", ""),
        ("<think><answer>4</answer></think>5", "5"),
        ("a <answer>4</answer> b <answer> 5\n</answer> c", "5"),
        ("<answer>4 <answer>5</answer>", "5"),
        ("<answer>5", "<answer>5"),
        ("#### 4 \\boxed{3} <answer>5</answer> #### 6", "5"),
        ("4\n#### 5", "5"),
        ("#### 4\n#### 5 \\boxed{6}", "5 \\boxed{6}"),
        ("####", ""),
        ("so 5\n####", "so 5"),
        ("4\n#### 5\n####\n", "5"),
        ("##### 5", "5"),
        ("\\boxed{5}\n####", "5"),
        (r"\boxed{4} so \boxed{\frac{1}{2}} and {7}", r"\frac{1}{2}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\boxed{5}}", "5"),
        (r"} \boxed {5}", "5"),
        (r"\boxed 5", r"\boxed 5"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_the_pairs_are_half_right_and_differ():
    assert len({(pair["answer"], pair["output"]) for pair in PAIRS}) == len(PAIRS) == 200
    assert sum(pair["right"] for pair in PAIRS) == 100
    assert all(pair["ours"] is not pair["right"] and pair["why"] for pair in PAIRS if "ours" in pair)
    assert all(pair["math_verify"] is not pair["right"] for pair in PAIRS if "math_verify" in pair)


@pytest.mark.parametrize("topic", sorted({pair["topic"] for pair in PAIRS}))
def test_answers_are_judged_as_by_hand(topic):
    pairs = [pair for pair in PAIRS if pair["topic"] == topic]
    wrong = [
        p for p in pairs if verify({"answer": p["answer"]}, p["output"]) is not p.get("ours", p["right"])
    ]
    assert pairs and wrong == []


def test_the_built_in_reward_is_verify():
    outputs, answers = [pair["output"] for pair in PAIRS], [pair["answer"] for pair in PAIRS]
    expected = [float(pair.get("ours", pair["right"])) for pair in PAIRS]
    assert exact_answer(outputs, outputs, answer=answers) == expected


@pytest.mark.slow
def test_math_verify_differs_where_it_is_said_to():
    math_verify = pytest.importorskip("math_verify")
    from importlib.metadata import version

    if not version("math-verify").startswith("0.9."):
        pytest.skip("the verdicts are those of math-verify 0.9")

    def read(text):
        return math_verify.parse(text, parsing_timeout=None)

    def verdict(pair):
        # in a box, because it reads LaTeX only where it is marked as such
        reference, answer = read(rf"\boxed{{{pair['answer']}}}"), read(pair["output"])
        return bool(reference and answer and math_verify.verify(reference, answer, timeout_seconds=None))

    differs = [pair for pair in PAIRS if verdict(pair) is not pair["right"]]
    assert differs == [pair for pair in PAIRS if "math_verify" in pair]


@pytest.mark.parametrize(
    "answer, text, right",
    [
        ("1:2", "1 : 2", True),
        ("1:2", "2:1", False),
        ("10:30", "10:31", False),
        ("x < 3", r"x \lt 3", True),
        ("x < 3", "x > 3", False),
        ("2x + 1", r"\boxed{y = 2x+1}", True),
        ("y = 2x + 1", "2x + 1", False),
        (r"\frac{1+\sqrt{5}}{2}", r"$\dfrac{1 + \sqrt 5}{2}$", True),
        (r"\frac{1+\sqrt{5}}{2}", r"\frac{1 - \sqrt{5}}{2}", False),
        (r"\text{(C)}", "C", True),
        ("5 apples and 3 pears", "3 apples and 5 pears", False),
        ("1/2", "50%", True),
        ("0.5", "0.5%", True),  # to a question about percents
        ("50%", "0.5%", False),
        ("0.5%", "0.5%", True),
        ("(2, 3)", "The solution is $(x, y) = (2, 3)$.", True),
        ("(2, 3)", "x = 2, y = 3", False),
        ("3", "x = 2, y = 3", True),  # the question may be about y
        ("3", "x = 2, x = 3", False),
        ("3", "1, 2, 3", False),
        ("[a, b)", "[a,b)", True),
        ("[a, b)", "(a, b]", False),
        ("{1,000, 2,000}", "{2000, 1000}", True),
        ("1; 2", "[1, 2]", True),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "1,2,3,4,5,6,7,8,9,10", True),  # more than eight words
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "1,2,3,4,5,6,7,8,9,11", False),
        (r"\{1, 1, 2\}", r"\{1, 2\}", True),
        (r"(0, 1) \cup (2, 3)", r"(2, 3) \cup (0, 1)", True),
        (r"(0, 1) \cup (2, 3)", r"(0, 1) \cup", False),
        ("(x, 1)", "(x,1)", True),
        ("(x, 1)", "1", False),
        (r"\pi", r"\boxed{\pi}", True),
        (r"\pi", "3.14", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
    ],
)
def test_same(answer, text, right):
    assert verify({"answer": answer}, text) is right
