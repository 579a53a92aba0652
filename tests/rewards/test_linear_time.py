"""Checkers, rewards, IFEval rules and comparisons take linear time, whatever a model writes."""

from __future__ import annotations

import time

import pytest

from mlx_posttrain.data.tasks import checks, courtesy
from mlx_posttrain.evaluation import reasoning
from mlx_posttrain.rewards import ifeval, python_tests, shape, stock
from mlx_posttrain.rewards.answers import final_answer
from mlx_posttrain.rewards.verify import verify

pytestmark = pytest.mark.slow
LENGTH = 20_000  # characters
SECONDS = 2.0

PIECES = (
    *(" ", "\n", "\n\n", "\t", " \n", "\u2003", "\r\n"),
    *("(", ")", "[", "]", "{", "}", "()", "[]", "{}", "<", ">", "<<", ">>", "<<a\n", "[a\n"),
    *(
        '"',
        "'",
        "`",
        "\u201c",
        "* ",
        "*",
        "**",
        "***",
        "******",
        "-",
        "-\n",
        "*\n",
        "_",
        "#",
        "####",
        "#### ",
    ),
    *(",", ", ", ".", ". ", "...", "!", "?", ";", ": ", "=", "= ", "=a", "/", "^", "^{", "%", "$", "\\$"),
    *("1", "1 ", "1,", "1, ", "1.", "1/", "1 1/", "1 / ", "1e", "1^", "1 x 10^", "-1", "1 + ", "1 + 1 = 2. "),
    *("1" * 50 + " ", "1" * 50 + " + ", "1 + " + "1" * 5000 + " = 2", "1,000,", "\u00bd", "\u00b2", "\u0661"),
    *(
        "a",
        "a ",
        "A ",
        "a.",
        "a'",
        "x=1, ",
        "and ",
        "1 or ",
        "p. ",
        "P.S",
        "Section ",
        "n't ",
        "so ",
        "step ",
    ),
    *(
        "\\",
        "\\boxed{",
        "\\boxed{1} ",
        "\\frac",
        "\\frac{",
        "\\frac1",
        "\\frac{1}{",
        "\\sqrt{",
        "\\text{",
        "\\{",
    ),
    *("\\left(", "{,}", "\\,", "\\infty ", "\u222a", "(1, 2) \\cup ", "(1, ", "0.\\overline{", "~"),
    *("<think>", "</think>", "<think></think>", "<answer>", "</answer>", "<answer>1</answer>"),
    *("You are welcome", "You are welcome. ", "Sure! ", "The answer is ", "Good grief ", "Tom had a dog. "),
)
ENDS = {"alone": ("", ""), "between lines": ("I say 7.\n", "\nx y")}
SPECS = (
    checks.one_of("cold", "7"),
    checks.literal("- a\n- b"),
    checks.in_order("sun", "dog"),
    checks.number(7),
    checks.worked([3, 4, 2], 9),
    checks.sentences(["Tom"], least=1, most=100_000, any_of=["a dog"]),
)
KWARGS = {
    "keywords": ["cat", "aa", "1 1"],
    "keyword": "aa",
    "frequency": 2,
    "relation": "at least",
    "forbidden_words": ["cat", "11", "a a"],
    "letter": "e",
    "let_frequency": 3,
    "let_relation": "at least",
    "num_sentences": 3,
    "num_paragraphs": 3,
    "num_words": 3,
    "nth_paragraph": 1,
    "first_word": "so",
    "num_placeholders": 100_000,
    "postscript_marker": "P.S.",
    "num_bullets": 3,
    "num_highlights": 100_000,
    "section_spliter": "Section",
    "num_sections": 100_000,
    "prompt_to_repeat": "a a a a",
    "end_phrase": "the end",
    "capital_frequency": 2,
    "capital_relation": "at least",
}
REFERENCES = ("7", "Paris", "2\\pi", "(1, 2]")


@pytest.fixture(params=["alone", pytest.param("between lines", marks=pytest.mark.exhaustive)])
def slowest(request):
    """A function that finds the longest time that one of some functions takes for one of the texts, and
    names both.
    """
    begin, end = ENDS[request.param]

    def find(functions):
        worst = (0.0, "", "")
        for piece in PIECES:
            text = begin + (piece * LENGTH)[:LENGTH] + end
            for name, function in functions.items():
                start = time.process_time()
                function(text)
                worst = max(worst, (time.process_time() - start, name, repr(piece[:20])))
        return worst

    return find


def test_checkers(slowest):
    assert {spec["kind"] for spec in SPECS} == set(checks.KINDS)
    functions = {
        "equations_hold": checks.equations_hold,
        "unframed": courtesy.unframed,
        "is_rude": courtesy.is_rude,
        **{spec["kind"]: (lambda text, spec=spec: checks.check(spec, text)) for spec in SPECS},
    }
    assert slowest(functions) < (SECONDS,)


def test_integers_that_int_refuses():
    long = "9" * 5000
    assert not checks.equations_hold(f"1 + {long} = {long}") and checks.equations_hold(f"1 + {long}")
    text = f"3 + 4 = {long}. {long} + 2 = 9. The answer is 9."
    assert checks.check(checks.worked([3, 4, 2], 9), text) is False


def test_ifeval(slowest):
    functions = {rule: (lambda text, rule=rule: ifeval.follows(rule, KWARGS, text)) for rule in ifeval.RULES}
    assert slowest(functions) < (SECONDS,)


@pytest.mark.parametrize("reference", REFERENCES)
def test_answers(slowest, reference):
    assert slowest({reference: lambda text: verify({"answer": reference}, text)}) < (SECONDS,)


def test_other_rules(slowest):
    game = {"numbers": [1, 2, 3], "target": 6}
    functions = {
        "countdown": lambda text: verify(game, text),
        "final answer": final_answer,
        "thought": lambda text: reasoning.shape_score(f"<think>{text}</think>1"),
        "steps": lambda text: reasoning.count_steps(f"<think>{text}</think>1"),
    }
    assert slowest(functions) < (SECONDS,)


def test_rewards(slowest):
    reference = {"reference_answer": ["so the answer is 1 and a cat. " * 1000]}
    schema = {"type": "object", "additionalProperties": {"type": "array", "items": {"maximum": 3}}}
    functions = {
        "think": lambda text: shape.format(["p"], [text]),
        "tags": lambda text: shape.format(["p"], [text], tags=["think", "answer"]),
        "json": lambda text: shape.json(["p"], [text], json_schema=schema),
        "nested json": lambda text: shape.json(["p"], ['{"a":' + text], json_schema=schema),
        "f1": lambda text: stock.similarity(["p"], [text], **reference),
        "rouge_l": lambda text: stock.similarity(["p"], [text], **reference, metric="rouge_l"),
        "countdown": lambda text: stock.countdown(["p"], [text], target=[3], nums=[[1, 2]]),
        "code": python_tests._code,
        "repetition": lambda text: shape.repetition(["p"], [text], [list(text.encode())], n=3),
    }
    assert slowest(functions) < (SECONDS,)
