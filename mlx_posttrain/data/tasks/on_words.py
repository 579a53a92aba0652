"""Families over single words: spelling, forms, rhymes, knowledge."""

from __future__ import annotations

import random

from mlx_posttrain.data.tasks.checks import in_order, literal, number, one_of
from mlx_posttrain.data.tasks.family import Item, content, family, unordered
from mlx_posttrain.data.tasks.words import (
    ADJECTIVES,
    COLOURS,
    FOODS,
    KINDS,
    MORE_COUNTABLE,
    NOUNS,
    RHYME_GROUPS,
    SIZES,
    a,
    plural,
)

SHORT_WORDS = sorted(
    {word for word in (*NOUNS, *COLOURS, *ADJECTIVES, *FOODS, *MORE_COUNTABLE) if len(word) <= 7}
)
COUNTABLE = sorted({*NOUNS, *MORE_COUNTABLE})


@family(
    "more than one of a thing",
    train=(
        "What is the plural of {word}?",
        "Write the plural of this word. | {word}",
        "One {word}, two what?",
        "Make this word plural: {word}",
        "I have one {word}. You have many of them. Write the plural.",
    ),
    held=("Give the plural form of {word}.", "Tell me the plural of the word {word}."),
)
def plurals(rng: random.Random) -> Item:
    word = rng.choice(COUNTABLE)
    answer = plural(word)
    other = plural(rng.choice(COUNTABLE))
    return Item(
        content("plural", word),
        {"word": word},
        answer,
        one_of(answer, f"two {answer}"),
        (word, word + "ed", word + "ing", other),
    )


@family(
    "a word in capital letters",
    train=(
        "Write {word} in capital letters.",
        "Make every letter a capital letter. | {word}",
        "Turn this word into capital letters: {word}",
        "Write this word with big capital letters. | {word}",
        "How do you write {word} in capital letters?",
    ),
    held=("Put {word} in capital letters.", "Change this word to capital letters. | {word}"),
)
def uppercase(rng: random.Random) -> Item:
    word, other = rng.sample(SHORT_WORDS, 2)
    wrong = (word, word.capitalize(), other.upper())
    return Item(content("letters", word), {"word": word}, word.upper(), literal(word.upper()), wrong)


@family(
    "a word letter by letter",
    train=(
        "Spell the word {word}.",
        "Write the letters of {word} with dashes.",
        "Spell this word letter by letter. | {word}",
        "How do you spell {word}?",
        "Put a dash between the letters of this word. | {word}",
    ),
    held=("Spell out the word {word}.", "Write {word} letter by letter."),
)
def spell_out(rng: random.Random) -> Item:
    word = rng.choice(SHORT_WORDS)
    swapped = "-".join([word[1], word[0], *word[2:]])
    return Item(
        content("letters", word),
        {"word": word},
        "-".join(word),
        in_order(*word),
        ("-".join(word[:-1]), swapped, word, "-".join(word + "s")),
    )


@family(
    "how many letters a word has",
    train=(
        "How many letters are in the word {word}?",
        "Count the letters in this word. | {word}",
        "How many letters does {word} have?",
        "Write the number of letters: {word}",
        "Count the letters of {word}.",
    ),
    held=("Tell me how many letters {word} has.", "What is the number of letters in {word}?"),
)
def count_letters(rng: random.Random) -> Item:
    word = rng.choice(SHORT_WORDS)
    n = len(word)
    wrong = (str(n + 1), str(n - 1), str(n + 2))
    return Item(content("letters", word), {"word": word}, str(n), number(n), wrong)


@family(
    "which of two words rhymes",
    train=(
        "Which word rhymes with {word}: {one} or {two}?",
        "Choose the word that rhymes with {word}. | {one}, {two}",
        "Does {one} or {two} rhyme with {word}?",
        "Find a rhyme for {word}. | {one}, {two}",
        "One of these words rhymes with {word}. Which one? | {one}, {two}",
    ),
    held=(
        "Say which word rhymes with {word}. | {one}, {two}",
        "Here are two words: {one} and {two}. Which rhymes with {word}?",
    ),
)
def rhymes(rng: random.Random) -> Item:
    group, others = rng.sample(RHYME_GROUPS, 2)
    word, answer = rng.sample(group, 2)
    wrong = rng.choice(others)
    one, two = rng.sample((answer, wrong), 2)
    slots = {"word": word, "one": one, "two": two}
    return Item(unordered("rhyme", (word, answer)), slots, answer, one_of(answer), (wrong,))


@family(
    "which of two things is bigger or smaller",
    train=(
        "Which is {which}, {one} or {two}?",
        "What is {which}: {one} or {two}?",
        "Choose the {which} one: {one} or {two}.",
        "Think of {one} and {two}. Which one is {which}?",
        "Name the {which} of the two. | {one}, {two}",
    ),
    held=("Which one is {which}? | {one}, {two}", "Tell me which is {which}, {one} or {two}."),
)
def compare_sizes(rng: random.Random) -> Item:
    small, big = sorted(rng.sample(range(len(SIZES)), 2))
    while big - small < 3:
        small, big = sorted(rng.sample(range(len(SIZES)), 2))
    which = rng.choice(("bigger", "smaller"))
    answer, wrong = (SIZES[big], SIZES[small]) if which == "bigger" else (SIZES[small], SIZES[big])
    one, two = rng.sample((answer, wrong), 2)
    slots = {"which": which, "one": a(one), "two": a(two)}
    return Item(
        unordered("sizes", (one, two)),
        slots,
        a(answer),
        one_of(a(answer), answer, f"the {answer}"),
        (a(wrong), f"{a(one)} and {a(two)}"),
    )


@family(
    "whether a statement is true or false",
    train=(
        "True or false: {fact}.",
        "Is this true or false? | {fact}.",
        "Say if this is true or false: {fact}.",
        "Read this: {fact}. Is it true or false?",
        "Write true or false. | {fact}.",
    ),
    held=("Tell me if this is true or false. | {fact}.", "{fact}. Is that true or false?"),
)
def true_false(rng: random.Random) -> Item:
    true = rng.random() < 0.5
    if rng.random() < 0.5:
        kind, other = rng.sample(list(KINDS), 2)
        word = rng.choice(KINDS[kind][0])
        fact, key = f"{a(word)} is {KINDS[kind if true else other][1]}", content("kind", word)
    else:
        low, high = sorted(rng.sample(range(1, 31), 2))
        fact = f"{high} is more than {low}" if true else f"{low} is more than {high}"
        key = unordered("numbers", (low, high))
    answers = ("true", "false") if true else ("false", "true")
    return Item(key, {"fact": fact}, answers[0], one_of(answers[0]), (answers[1],))


FAMILIES = (plurals, uppercase, spell_out, count_letters, rhymes, compare_sizes, true_false)
