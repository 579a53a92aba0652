"""Families over small numbers, and patterns."""

from __future__ import annotations

import random

from mlx_posttrain.data.tasks.checks import in_order, number, one_of, worked
from mlx_posttrain.data.tasks.family import Item, content, family, unordered
from mlx_posttrain.data.tasks.on_lists import shuffled
from mlx_posttrain.data.tasks.words import NOUNS


@family(
    "add or take away",
    train=(
        "What is {sum}?",
        "Work out {sum}.",
        "Write the answer. | {sum} =",
        "How much is {sum}?",
        "Find the answer to {sum}.",
    ),
    held=("Tell me what {sum} is.", "Please work this out. | {sum}"),
)
def arithmetic(rng: random.Random) -> Item:
    one, two = rng.randint(1, 15), rng.randint(1, 15)
    if rng.random() < 0.5:
        asked, answer, terms = f"{one} + {two}", one + two, (one, two)
    else:
        asked, answer, terms = f"{one + two} - {two}", one, (one + two, -two)
    wrong = (str(answer + 1), str(answer - 1), str(answer + rng.choice((2, 3, 10))))
    return Item(unordered("sum", terms), {"sum": asked}, str(answer), number(answer), wrong)


@family(
    "three numbers to add or take away, with the steps",
    train=(
        "Work out {sum} step by step.",
        "What is {sum}? Show the steps.",
        "Show each step and then the answer. | {sum}",
        "Find {sum} and show your steps.",
        "Go step by step. | {sum} =",
    ),
    held=("Show the steps to work out {sum}.", "Please do this step by step. | {sum}"),
)
def steps(rng: random.Random) -> Item:
    one, two, three = rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    half = one + two
    sign = rng.choice("+-") if half >= three else "+"
    total = half + three if sign == "+" else half - three

    def shown(middle: int, end: int) -> str:
        return f"{one} + {two} = {middle}. {middle} {sign} {three} = {end}. The answer is {end}."

    asked, off = f"{one} + {two} {sign} {three}", rng.choice((1, 2))
    terms = (one, two, three if sign == "+" else -three)
    wrong = (shown(half, total + off), shown(half + off, total), shown(half + off, total + off))
    spec = worked([one, two, three], total)
    return Item(unordered("sum", terms), {"sum": asked}, shown(half, total), spec, wrong)


@family(
    "the bigger or smaller of two numbers",
    train=(
        "Which number is {which}, {one} or {two}?",
        "Which is {which}: {one} or {two}?",
        "Write the {which} number. | {one}, {two}",
        "Choose the {which} number: {one} or {two}",
        "Look at {one} and {two}. Which number is {which}?",
    ),
    held=("Tell me the {which} number. | {one}, {two}", "Of {one} and {two}, which number is {which}?"),
)
def compare_numbers(rng: random.Random) -> Item:
    numbers, which = rng.sample(range(1, 51), 2), rng.choice(("bigger", "smaller"))
    answer = max(numbers) if which == "bigger" else min(numbers)
    one, two = map(str, numbers)
    other = sum(numbers) - answer
    wrong = (str(other), str(other), f"{one} and {two}")
    slots = {"which": which, "one": one, "two": two}
    return Item(unordered("numbers", numbers), slots, str(answer), number(answer), wrong)


@family(
    "three numbers from small to big",
    train=(
        "Sort these numbers from small to big: {numbers}",
        "Put the numbers in order. | {numbers}",
        "Write these numbers from small to big. | {numbers}",
        "Put these numbers in order, the smallest first: {numbers}",
        "Sort the numbers: {numbers}",
    ),
    held=("Order these numbers from small to big. | {numbers}", "Can you sort these numbers: {numbers}?"),
)
def sort_numbers(rng: random.Random) -> Item:
    values = rng.sample(range(1, 31), 3)
    answer = [str(n) for n in sorted(values)]
    wrong = (", ".join(shuffled(rng, answer)), ", ".join(answer[::-1]), ", ".join(answer[:-1]))
    slots = {"numbers": ", ".join(map(str, values))}
    return Item(unordered("numbers", values), slots, ", ".join(answer), in_order(*answer), wrong)


@family(
    "what comes next in a pattern of numbers or words",
    train=(
        "What comes next: {items}?",
        "Write what comes next. | {items}",
        "Look at the pattern {items}. What is next?",
        "Go on with this pattern. | {items}",
        "Which one comes next in the pattern {items}?",
    ),
    held=("Tell me what comes next. | {items}", "Here is a pattern: {items}. What comes next?"),
)
def pattern(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        step = rng.choice((1, 2, 3, 5, 10))
        start = rng.randint(1, 30) if step < 5 else step * rng.randint(1, 10)
        key = content("pattern", start, step)
        items, answer = [str(start + step * n) for n in range(4)], str(start + step * 4)
        wrong = (str(start + step * 4 + 1), str(start + step * 5), items[-1])
    else:
        cycle = rng.sample(NOUNS, rng.choice((2, 2, 3)))
        shown = rng.randint(len(cycle) + 2, 6)
        items, answer = [cycle[n % len(cycle)] for n in range(shown)], cycle[shown % len(cycle)]
        wrong = tuple(word for word in cycle if word != answer)
        key = unordered("words", cycle)
    spec = number(int(answer)) if answer.isdigit() else one_of(answer)
    return Item(key, {"items": ", ".join(items)}, answer, spec, wrong)


FAMILIES = (arithmetic, steps, compare_numbers, sort_numbers, pattern)
