"""IFEval's rules, each tested at its boundaries against results found by hand."""

from __future__ import annotations

import math

import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import ifeval
from mlx_posttrain.rewards.ifeval import follows, instruction_accuracy, loose, strict

CASES = [
    (
        "keywords:existence",
        {"keywords": ["cat", "Dog"]},
        ["A CAT and a dog.", "concatenate dogma"],
        ["a cat", "a dog", "c.at dog"],
    ),
    ("keywords:existence", {"keywords": ["a.c"]}, ["a.c"], ["abc"]),
    (
        "keywords:frequency",
        {"keyword": " cat ", "frequency": 2, "relation": "at least"},
        ["cat Cats", "cat cat cat"],
        ["cat", "dog"],
    ),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "less than"},
        ["cat", "dog"],
        ["cat Cats"],
    ),
    ("keywords:frequency", {"keyword": "aa", "frequency": 2, "relation": "at least"}, ["aaaa"], ["aaa"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat", "C++"]},
        ["concatenate", "cats", "C+"],
        ["a Cat.", "dog cat", "in C++."],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["eEe"],
        ["ee"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_frequency": 3, "let_relation": "less than"},
        ["ee", "x"],
        ["Eee"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 1, "let_relation": "at least"},
        ["a!"],
        ["a"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["One.", "no end"],
        ["One. Two."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One! Two"],
        ["One."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***", "a***b"],
        ["a", "a***b***c", "a***\n***b"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "well-known x", "isn't x"],
        ["one two"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["one - two!"],
        ["one two three"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        ["One.\n\nso, two", "One\n\n\"SO' two", "a\n\nSo\n\n  "],
        ["So\n\none", "One\n\nSome", "One\nSo", "a\n\nSo\n\nc", "So", "a\n\n\n\nSo"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] [b]", "[][x] [y]", "[a[b] [c]", "[a] ]\n[b] ["],
        ["[a]", "[a\n] [b]", "[[a]", "] [b] ["],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["a\np.s. b", "P. S. b", "a P.S."],
        ["PS b", "P.S b"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["P.P.S b", "p. p. s. b"],
        ["P.S. b", "PPS"],
    ),
    ("detectable_content:postscript", {"postscript_marker": " N.B."}, ["n.b. it"], ["nab. it"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  *b", "a\n-\n- b", "*\n* a\n\n* b"],
        ["* a", "* a\n- b\n- c", "** a\n* b", "*\n* a\n*", "- a\n*"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well. My answer is maybe. So."],
        ["My answer is no", "no."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* **b**", "*a*\n*b*", "**a** and **b**", "***a***"],
        ["*a*", "**a**", "*a* **", "* *b* *", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section ", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section 2 Section 3"],
        ["Section 1", "SECTION 1 SECTION 2", "Section A Section B"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```", "5", '```JSON\n"x"```'],
        ["{'a': 1}", '{"a": 1', 'Here: {"a": 1}', "text", "[" * 100_000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<a title>>\ntext", "so <<b>>", "<<>> <<b>>"],
        ["<a>", "<<>>", "<<>>>", "<< >>", "<<a\nb>>"],
    ),
    (
        "combination:two_responses",
        {},
        ["a******b", "******\na\n******\nb\n******"],
        ["a", "a******a ", "a******b******c", "a************b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": " Say hi. "},
        ["say hi. Hi", "Say hi."],
        ["Hi. Say hi.", "Say  hi."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": " The End. "},
        ["So: the end.", '"a. THE END."\n', "The end."],
        ["The end", "The end. So."],
    ),
    ("startend:quotation", {}, ['"a"', ' "a "b" c"\n', '""'], ['"', '"a', 'a"', "'a'", "\u201ca\u201d"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["I SAY", "I'M", "(A) B2"],
        ["I say", "A-B"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["WELL-KNOWN", "iPhone"],
        ["A, B"],
    ),
    ("change_case:english_capital", {}, ["ALL, 1.", "\u00c9T\u00c9"], ["ALL but", "1 + 1"]),
    ("change_case:english_lowercase", {}, ["all, 1."], ["All", "1 + 1"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "1,000"]),
]


@pytest.mark.parametrize(
    "instruction_id, kwargs, good, bad", CASES, ids=[f"{one[0]}-{i}" for i, one in enumerate(CASES)]
)
def test_every_rule(instruction_id, kwargs, good, bad):
    assert [text for text in good if follows(instruction_id, kwargs, text) is not True] == []
    assert [text for text in bad if follows(instruction_id, kwargs, text) is not False] == []
    assert follows(instruction_id, kwargs, " \n") is False  # a blank text follows nothing
    # the hub's rows hold every key
    hub = dict.fromkeys(["keyword", "num_words", "prompt_to_repeat", "letter"]) | kwargs
    assert follows(instruction_id, hub, good[0]) is True


def test_every_rule_has_a_case():
    assert {one[0] for one in CASES} == set(ifeval.RULES) and len(ifeval.RULES) == 24


@pytest.mark.parametrize(
    "text, count",
    [
        ("One. Two! Three? Four", 4),
        ("Dr. A. B. Smith met Mrs. Jones at 3.14 p.m. today.", 1),
        ("Use fruit, e.g. apples, vs. nuts.", 1),
        ("Wait... what?! Really...", 2),
        ("Wait... What now?", 2),
        ('He said "Stop." Then (he left.) **Done.**', 3),
        ("No end\n\nand none here", 1),
        ("It was etc. Then more.", 2),
        ("Is it no. Yes.", 2),
        ('a.com is one. "', 1),
        ("1. First\n2. Second", 3),  # the numbers of a list end sentences, as in Punkt
        ("...", 1),
        ("", 0),
    ],
)
def test_sentences(text, count):
    assert ifeval._sentences(text) == count


def test_what_cannot_be_judged_and_what_is_wrong():
    assert follows("language:response_language", {"language": "de"}, "Ja.") is None
    for instruction_id, kwargs, message in [
        (
            "punctuation:no_coma",
            {},
            "no instruction 'punctuation:no_coma'; did you mean 'punctuation:no_comma'",
        ),
        ("keywords:existence", {"keywords": None}, "needs 'keywords', a list of texts"),
        ("keywords:existence", {"keywords": "cat"}, "found 'cat'"),
        ("keywords:existence", {"keywords": [1]}, "a list of texts"),
        ("length_constraints:number_words", {"relation": "at least"}, "needs 'num_words', a number"),
        ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "found True"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "no relation 'at most'"),
        ("combination:repeat_prompt", None, "needs 'prompt_to_repeat', a text"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            follows(instruction_id, kwargs, "text")
        assert "\n" not in str(error.value)
    assert follows("combination:repeat_prompt", None, "Say hi. Hi", prompt="Say hi.") is True
    assert (
        follows("combination:repeat_prompt", {"prompt_to_repeat": None}, "Say hi. Hi", prompt="Say hi.")
        is True
    )
    assert (
        follows("combination:repeat_prompt", {"prompt_to_repeat": "Hi"}, "Say hi.", prompt="Say hi.") is False
    )
    # 0 is not a missing value, and a table's float is a whole number
    assert follows("detectable_format:number_bullet_lists", {"num_bullets": 0}, "text") is True
    kwargs = {"num_paragraphs": 1.0, "nth_paragraph": 1.0, "first_word": "so"}
    assert follows("length_constraints:nth_paragraph_first_word", kwargs, "So.") is True


def row(*instructions, prompt="Say hi."):
    return {
        "prompt": prompt,
        "instruction_id_list": [one for one, _ in instructions],
        "kwargs": [own for _, own in instructions],
    }


COMMA, TITLE, GERMAN = (
    ("punctuation:no_comma", {}),
    ("detectable_format:title", None),
    ("language:response_language", {"language": "de"}),
)
WORDS = ("length_constraints:number_words", {"num_words": 3, "relation": "less than"})


def test_strict_and_loose():
    both = row(COMMA, TITLE)
    assert strict(both, "<<a>> b") is True and strict(both, "<<a>>, b") is False
    assert strict(row(COMMA, GERMAN), "a, b") is False and strict(row(COMMA, GERMAN), "a") is True
    assert strict(row(GERMAN), "Ja.") is None and loose(row(GERMAN), "Ja.") is None
    assert strict(row(("combination:repeat_prompt", {})), "Say hi. Hi") is True
    polite = "Sure, here:\na b\nBye, you."
    assert strict(row(COMMA), polite) is False
    assert loose(row(COMMA), polite) is True  # without both
    assert (
        loose(row(COMMA), "Sure,\na\nb")
        and loose(row(COMMA), "a\nb\nBye,")
        and not loose(row(COMMA), "a\nb, c\nd")
    )
    assert loose(row(COMMA), "a, b") is False  # without its only line, no text is left
    end = row(("startend:end_checker", {"end_phrase": "The end"}))
    assert strict(end, "So *the end*") is False and loose(end, "So *the end*") is True
    assert loose(row(COMMA, WORDS), "a b c,\na b c") is False  # each line is too long
    assert loose(row(COMMA, WORDS), "Sure, a\nb") is True
    # each instruction may be followed by another of the texts, as in the reference
    assert loose(row(("change_case:english_lowercase", {}), COMMA), "A,\nb\nc,") is True
    with pytest.raises(UserError, match="2 instructions and 1 kwargs"):
        strict(both | {"kwargs": [{}]}, "a")
    with pytest.raises(UserError, match="no instruction"):
        strict(row(("none:none", {})), "a")


def test_accuracies():
    rows = [row(COMMA, TITLE), row(COMMA), row(GERMAN), row(TITLE, GERMAN, WORDS)]
    texts = ["<<a>>, b", "a", "Ja.", "<<a>>"]
    # prompts: no, yes, -, yes; instructions: no yes, yes, -, yes - yes
    assert instruction_accuracy(rows, texts) == (2 / 3, 4 / 5)
    assert all(map(math.isnan, instruction_accuracy([row(GERMAN)], ["Ja."])))
    assert all(map(math.isnan, instruction_accuracy([], [])))
    with pytest.raises(ValueError):
        instruction_accuracy(rows, texts[:1])
