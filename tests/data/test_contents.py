"""Held-out contents: a canonical form written from the rows' texts alone finds none in training too."""

from __future__ import annotations

import random
import re

import pytest

from mlx_posttrain.data import tasks
from mlx_posttrain.data.tasks import _TASKS, _TRACES, words
from mlx_posttrain.data.tasks.on_words import SHORT_WORDS

ROWS = 20_000
SUBJECTS = r"(?:I|We|They|You|The boys|The girls|My friends|The children) "


def tokens(text):
    return re.findall(r"[A-Za-z]+", text)


def among(text, vocabulary):
    return frozenset(word for word in tokens(text) if word in vocabulary)


def numbers(text):
    return frozenset(int(n) for n in re.findall(r"\d+", text))


def terms(text):
    """The signed numbers of a sum, in any order."""
    found = re.search(r"\d+(?: [+-] \d+)+", text).group()
    return tuple(sorted(int(n.replace(" ", "")) for n in re.findall(r"(?:- )?\d+", found)))


def listed(text):
    """The words of the longest list in the text, in any order."""
    lists = re.findall(r"\w+(?:, \w+)+", text)
    return tuple(sorted(re.findall(r"\w+", max(lists, key=len))))


def nameless(text):
    return tuple(sorted(re.sub("|".join(words.NAMES), "N", part) for part in re.split(r"[.?]", text)))


def rhyming(text, answer):
    groups = [group for group in words.RHYME_GROUPS if answer in group]
    return frozenset(word for word in tokens(text) for group in groups if word in group)


def signed_story(text):
    sign = {"has": 1, "finds": 1, "gets": 1, "buys": 1, "loses": -1, "gives": -1, "breaks": -1}
    return tuple(sorted(sign[verb] * int(n) for verb, n in re.findall(r"(\w+) (\d+)", text)))


def letters(text, answer):
    return "letters", [word for word in tokens(text) if word in SHORT_WORDS][-1]


# family -> the content of a question's text (instruction and input) and its answer
CANONICAL = {
    "repeat_word": lambda text, answer: ("repeat", answer),
    "odd_one_out": lambda text, answer: ("list", listed(text)),
    "plurals": lambda text, answer: ("plural", answer),
    "uppercase": lambda text, answer: ("letters", answer.lower()),
    "spell_out": lambda text, answer: ("letters", answer.replace("-", "")),
    "count_letters": letters,
    "rhymes": lambda text, answer: ("rhyme", rhyming(text, answer)),
    "compare_sizes": lambda text, answer: ("sizes", among(text, words.SIZES)),
    "true_false": lambda text, answer: (
        ("numbers", numbers(text))
        if numbers(text)
        else ("kind", re.search(r"(\w+) is (?:an? |something)", text).group(1))
    ),
    "arithmetic": lambda text, answer: ("sum", terms(text)),
    "steps": lambda text, answer: ("sum", terms(text)),
    "compare_numbers": lambda text, answer: ("numbers", numbers(text)),
    "sort_numbers": lambda text, answer: ("numbers", numbers(text)),
    "pattern": lambda text, answer: ("pattern", frozenset(re.findall(r"\w+", f"{listed(text)} {answer}"))),
    "replace_word": lambda text, answer: (
        "replace",
        frozenset(tokens(re.search(r"The \w+ is \w+ in the \w+\.", text).group() + answer)),
    ),
    "quotes": lambda text, answer: ("phrase", answer),
    "past_tense": lambda text, answer: ("predicate", re.search(f"{SUBJECTS}(.*?)\\.", answer).group(1)),
    "reading": lambda text, answer: (
        "told",
        nameless(re.search(r"\w+ (?:is|has) [^.]*\. \w+ (?:is|has) [^.]*\.", text).group()),
    ),
    "polite_request": lambda text, answer: ("request", answer),
    "story": lambda text, answer: ("story", among(text, words.ANIMALS), among(text, words.THINGS)),
    "long_sum": lambda text, answer: ("sum", terms(text)),
    "number_story": lambda text, answer: ("sum", signed_story(text)),
    "who_has_more": lambda text, answer: (
        "two sums",
        tuple(sorted(tuple(sorted(map(int, n))) for n in re.findall(r"has (\d+) \w+ and (\d+)", text))),
    ),
    "sort_by_steps": lambda text, answer: ("numbers", numbers(text)),
    "count_by_steps": lambda text, answer: ("count", listed(text), answer),
    "put_in_order": lambda text, answer: (
        "order",
        frozenset(re.findall(r"[Tt]he (\w+) (?:is|\.)|than the (\w+)", text)),
    ),
    "follow_moves": lambda text, answer: ("moves", among(text, words.THINGS), among(text, words.PLACES)),
}


def canonical(row):
    text = row["question"] if "question" in row else f"{row['instruction']} {row['input']}"
    answer = row.get("answer", row.get("output"))
    return CANONICAL.get(row["family"], lambda text, answer: ("list", listed(text)))(text, answer)


def found(split, seed):
    return [canonical(row) for make in (tasks.load, tasks.reasoning) for row in make(split, ROWS, seed)]


def test_no_content_of_20000_rows_is_in_training_and_held_out():
    trained, held_out = set(found("train", 0)), set(found("valid", 1))
    assert len(trained) > 10_000 and len(held_out) > 3_000
    assert trained & held_out == set()


def test_the_other_form_would_find_a_spelling():
    """The check above can fail: the two orders of a pair are one content."""
    sizes = {"family": "compare_sizes", "input": "", "output": "a horse"}
    assert canonical({**sizes, "instruction": "Which is bigger, a horse or a cat?"}) == canonical(
        {**sizes, "instruction": "What is smaller: a cat or a horse?", "output": "a cat"}
    )
    past = {"family": "past_tense", "input": "", "instruction": ""}
    assert canonical({**past, "output": "They saw a bird."}) == canonical({**past, "output": "I saw a bird."})


@pytest.mark.parametrize("one", [*_TASKS.values(), *_TRACES.values()], ids=lambda one: one.name)
def test_every_family_has_at_least_300_contents(one):
    rng = random.Random(0)
    assert len({one.draw(rng).content for _ in range(6000)}) >= 300


def test_a_content_is_held_out_in_every_family_that_has_it():
    held = {}
    for one in (*_TASKS.values(), *_TRACES.values()):
        rng = random.Random(1)
        for _ in range(2000):
            item = one.draw(rng)
            assert held.setdefault(item.content, item.held_out) == item.held_out
    assert 0.1 < sum(held.values()) / len(held) < 0.25
