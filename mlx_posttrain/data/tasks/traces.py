"""Families of questions answered by thinking in small steps.

Each step is true, short and follows from the one before.
"""

from __future__ import annotations

import random

from mlx_posttrain.data.tasks.checks import in_order, number, one_of
from mlx_posttrain.data.tasks.family import Item, content, family, unordered
from mlx_posttrain.data.tasks.on_lists import shuffled
from mlx_posttrain.data.tasks.words import NAMES, NOUNS, PLACES, THINGS, plural

_ABOUT_A_TEXT = {
    "train": (
        "{text} {question}",
        "{question} | {text}",
        "Read this. {text} {question}",
        "Think about this: {text} {question}",
        "{text} Now say: {question}",
    ),
    "held": ("Work this out. {text} {question}", "Answer the question: {question} | {text}"),
}


def _running_sum(rng: random.Random, terms: int) -> tuple[list[int], str, int]:
    """Draw numbers to add and take away.

    Returns (numbers, negative where taken away; one line per step; total).
    """
    total, signed, lines = rng.randint(1, 9), [], []
    start = total
    for _ in range(terms):
        value = rng.randint(1, 9)
        if value <= total and rng.random() < 0.5:
            value = -value
        sign = "+" if value > 0 else "-"
        lines.append(f"{total} {sign} {abs(value)} = {total + value}")
        signed.append(value)
        total += value
    return [start, *signed], "\n".join(lines), total


@family(
    "a longer sum",
    train=(
        "What is {sum}?",
        "Work out {sum}.",
        "Find the answer. | {sum} =",
        "How much is {sum}?",
        "Think step by step: what is {sum}?",
    ),
    held=("Tell me what {sum} is.", "Please work this out step by step. | {sum}"),
)
def long_sum(rng: random.Random) -> Item:
    numbers, lines, total = _running_sum(rng, rng.randint(2, 4))
    asked = str(numbers[0]) + "".join(f" {'+' if n > 0 else '-'} {abs(n)}" for n in numbers[1:])
    return Item(unordered("sum", numbers), {"sum": asked}, str(total), number(total), thinking=lines)


@family("a story with numbers", **_ABOUT_A_TEXT)
def number_story(rng: random.Random) -> Item:
    numbers, lines, total = _running_sum(rng, rng.randint(2, 3))
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    story = [f"{name} has {numbers[0]} {plural(thing) if numbers[0] > 1 else thing}."]
    for n in numbers[1:]:
        verb = rng.choice(
            ("finds {} more", "gets {} more", "buys {} more")
            if n > 0
            else ("loses {}", "gives {} away", "breaks {}")
        )
        story.append(f"{name} {verb.format(abs(n))}.")
    slots = {"text": " ".join(story), "question": f"How many {plural(thing)} does {name} have now?"}
    return Item(unordered("sum", numbers), slots, str(total), number(total), thinking=lines)


@family("who has more in all", **_ABOUT_A_TEXT)
def who_has_more(rng: random.Random) -> Item:
    names, (one, two) = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    while True:
        counts = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in names]
        totals = [sum(count) for count in counts]
        if totals[0] != totals[1]:
            break
    text = " ".join(
        f"{name} has {n} {plural(one)} and {m} {plural(two)}."
        for name, (n, m) in zip(names, counts, strict=True)
    )
    lines = [f"{name}: {n} + {m} = {n + m}" for name, (n, m) in zip(names, counts, strict=True)]
    lines.append(f"{max(totals)} is more than {min(totals)}")
    answer = names[totals.index(max(totals))]
    return Item(
        unordered("two sums", (unordered("sum", count) for count in counts)),
        {"text": text, "question": "Who has more things?"},
        answer,
        one_of(answer),
        thinking="\n".join(lines),
    )


@family(
    "numbers sorted by taking the smallest again and again",
    train=(
        "Sort these numbers from small to big: {numbers}",
        "Put the numbers in order. | {numbers}",
        "Write these numbers from small to big. | {numbers}",
        "Sort the numbers: {numbers}",
        "Think step by step and sort the numbers. | {numbers}",
    ),
    held=("Order these numbers from small to big. | {numbers}", "Can you sort these numbers: {numbers}?"),
)
def sort_by_steps(rng: random.Random) -> Item:
    numbers = rng.sample(range(1, 31), rng.randint(3, 5))
    left, lines = list(numbers), []
    while left:
        least = min(left)
        lines.append(f"{' '.join(map(str, left))}: smallest {least}")
        left.remove(least)
    answer = [str(n) for n in sorted(numbers)]
    asked = ", ".join(map(str, numbers))
    return Item(
        unordered("numbers", numbers),
        {"numbers": asked},
        ", ".join(answer),
        in_order(*answer),
        thinking="\n".join(lines),
    )


@family(
    "how often a word is in a list, word by word",
    train=(
        "How many times is the word {word} in this list? | {words}",
        "Count the word {word} in this list: {words}",
        "How many times do you see {word}: {words}?",
        "Here is a list: {words}. How many times is {word} in it?",
        "Go word by word and count {word}. | {words}",
    ),
    held=(
        "Tell me how many times this list has the word {word}. | {words}",
        "Count how many times you see {word} here: {words}",
    ),
)
def count_by_steps(rng: random.Random) -> Item:
    word, *others = rng.sample(NOUNS, 3)
    words = shuffled(
        rng, [word, *(rng.choice((word, word, *others)) for _ in range(rng.randint(3, 7))), others[0]]
    )
    lines, count = [], 0
    for one in words:
        count += one == word
        lines.append(f"{one}: {count}")
    slots = {"word": word, "words": ", ".join(words)}
    return Item(
        content("count", word, unordered("of", words)),
        slots,
        str(count),
        number(count),
        thinking="\n".join(lines),
    )


@family("which is first or last of three things, from two facts", **_ABOUT_A_TEXT)
def put_in_order(rng: random.Random) -> Item:
    things = rng.sample(THINGS, 3)
    more, most, least = rng.choice(
        (("bigger", "biggest", "smallest"), ("older", "oldest", "newest"), ("longer", "longest", "shortest"))
    )
    facts = [
        f"The {things[0]} is {more} than the {things[1]}.",
        f"The {things[1]} is {more} than the {things[2]}.",
    ]
    asked, answer = rng.choice(((most, things[0]), (least, things[2])))
    lines = [*facts, f"Order: {', '.join(things)}."]
    text = " ".join(rng.sample(facts, 2))
    slots = {"text": text, "question": f"Which is the {asked}?"}
    spec = one_of(answer, f"the {answer}")
    return Item(unordered("order", things), slots, answer, spec, thinking="\n".join(lines))


@family("where a thing is after it was moved", **_ABOUT_A_TEXT)
def follow_moves(rng: random.Random) -> Item:
    (thing, other), places, name = rng.sample(THINGS, 2), rng.sample(PLACES, 4), rng.choice(NAMES)
    at = {thing: places[0], other: places[1]}
    story, lines = (
        [f"The {what} is in the {where}." for what, where in at.items()],
        [f"{what}: {where}" for what, where in at.items()],
    )
    used = places[: 3 + rng.randint(0, 1)]
    for place in used[2:]:
        what = rng.choice((thing, other))
        at[what] = place
        story.append(f"{name} takes the {what} to the {place}.")
        lines.append(f"{what}: {place}")
    asked = rng.choice((thing, other))
    slots = {"text": " ".join(story), "question": f"Where is the {asked} now?"}
    key = unordered("moves", (thing, other, *used))
    answers = (at[asked], f"the {at[asked]}", f"in the {at[asked]}")
    return Item(key, slots, at[asked], one_of(*answers), thinking="\n".join(lines))


FAMILIES = (long_sum, number_story, who_has_more, sort_by_steps, count_by_steps, put_in_order, follow_moves)
