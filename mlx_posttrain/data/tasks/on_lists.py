"""Families over lists of words: copying, choosing, ordering, counting."""

from __future__ import annotations

import random

from mlx_posttrain.data.tasks.checks import NUMBER_WORDS, in_order, literal, number, one_of
from mlx_posttrain.data.tasks.family import Item, content, family, unordered
from mlx_posttrain.data.tasks.words import COLOURS, KINDS, NOUNS


def shuffled(rng: random.Random, words: list[str]) -> list[str]:
    """Return the words in a different order."""
    while (other := rng.sample(words, len(words))) == words:
        pass
    return other


@family(
    "say a word several times",
    train=(
        "Say the word {word} {times} times.",
        "Write {word} {times} times.",
        "Repeat this word {times} times. | {word}",
        "Please repeat {word} {times} times.",
        "Write the word below {times} times. | {word}",
    ),
    held=("Repeat the word {word} {times} times.", "I want to read the word {word} {times} times."),
)
def repeat_word(rng: random.Random) -> Item:
    word, times = rng.choice(NOUNS + COLOURS), rng.randint(2, 5)
    repeated = [" ".join([word] * n) for n in range(times + 2)]
    other = " ".join([rng.choice([noun for noun in NOUNS if noun != word])] * times)
    slots = {"word": word, "times": NUMBER_WORDS[times]}
    return Item(
        content("repeat", word, times),
        slots,
        repeated[times],
        in_order(*[word] * times),
        (repeated[times - 1], repeated[times + 1], other),
    )


@family(
    "the first or the last word of a list",
    train=(
        "What is the {which} word in this list? | {words}",
        "Write the {which} word: {words}",
        "Which word comes {which}: {words}?",
        "Here are some words: {words}. Say the {which} one.",
        "Find the {which} word of the list. | {words}",
    ),
    held=(
        "Tell me the {which} word of this list. | {words}",
        "Look at these words: {words}. Which is {which}?",
    ),
)
def first_last(rng: random.Random) -> Item:
    words, which = rng.sample(NOUNS, rng.randint(3, 5)), rng.choice(("first", "last"))
    answer = words[0 if which == "first" else -1]
    listed = ", ".join(words)
    return Item(
        unordered("words", words),
        {"which": which, "words": listed},
        answer,
        one_of(answer),
        tuple(w for w in words if w != answer),
    )


@family(
    "a list of words from back to front",
    train=(
        "Write these words in reverse order: {words}",
        "Turn this list around. | {words}",
        "Reverse the list: {words}",
        "Write the list from the last word to the first. | {words}",
        "Put these words in reverse order. | {words}",
    ),
    held=("Reverse these words. | {words}", "Can you write this list in reverse: {words}?"),
)
def reverse_list(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(2, 4))
    turned = words[::-1]
    wrong = (", ".join(words), ", ".join(turned[:-1]), ", ".join(shuffled(rng, turned)))
    return Item(
        unordered("words", words), {"words": ", ".join(words)}, ", ".join(turned), in_order(*turned), wrong
    )


@family(
    "words as a list with dashes",
    train=(
        "Make a list with dashes: {words}",
        "Write each word on its own line with a dash. | {words}",
        "Put these words in a list with dashes. | {words}",
        "Write a list with one dash for each word: {words}",
        "Turn this into a list with dashes. | {words}",
    ),
    held=(
        "Can you make a dash list of these words? | {words}",
        "Show these words as a list with dashes: {words}",
    ),
)
def bullet_list(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(2, 4))

    def dashed(items: list[str]) -> str:
        return "\n".join(f"- {item}" for item in items)

    wrong = (
        dashed(words[:-1]),
        dashed(shuffled(rng, words)),
        "\n".join(words),
        dashed([rng.choice(COLOURS), *words[1:]]),
    )
    return Item(
        unordered("words", words), {"words": ", ".join(words)}, dashed(words), literal(dashed(words)), wrong
    )


@family(
    "the word of another kind in a list",
    train=(
        "Which word does not belong: {words}?",
        "Find the odd one out. | {words}",
        "One word is not like the others. Which one? | {words}",
        "Say which word does not belong in the list. | {words}",
        "Which is the odd one out: {words}?",
    ),
    held=(
        "Which word is the odd one out? | {words}",
        "Look at the list: {words}. Which one does not belong?",
    ),
)
def odd_one_out(rng: random.Random) -> Item:
    most, odd = rng.sample(list(KINDS), 2)
    answer = rng.choice([word for word in KINDS[odd][0] if word not in KINDS[most][0]])
    others = rng.sample(KINDS[most][0], 3)
    words = rng.sample([answer, *others], 4)
    return Item(unordered("words", words), {"words": ", ".join(words)}, answer, one_of(answer), tuple(others))


@family(
    "the word of a given kind in a list",
    train=(
        "Which of these is {kind}: {words}?",
        "Find the word that is {kind}. | {words}",
        "One of these words is {kind}. Write it. | {words}",
        "Name the one that is {kind}: {words}",
        "Look at the list and choose {kind}. | {words}",
    ),
    held=("Which word is {kind}? | {words}", "Here is a list: {words}. Find {kind} in it."),
)
def pick_kind(rng: random.Random) -> Item:
    kinds = rng.sample(list(KINDS), 3)
    picked = [rng.choice(KINDS[kind][0]) for kind in kinds]
    words = rng.sample(picked, 3)
    slots = {"kind": KINDS[kinds[0]][1], "words": ", ".join(words)}
    return Item(unordered("words", words), slots, picked[0], one_of(picked[0]), tuple(picked[1:]))


@family(
    "whether a word is in a list, yes or no",
    train=(
        "Is the word {word} in this list? | {words}",
        "Here is a list: {words}. Is {word} in it?",
        "Yes or no: is {word} one of these words? | {words}",
        "Look for {word} in this list and say yes or no. | {words}",
        "Can you find {word} in the list {words}?",
    ),
    held=("Does this list have the word {word}? | {words}", "Say yes or no. Is {word} in the list {words}?"),
)
def yes_no(rng: random.Random) -> Item:
    words, present = rng.sample(NOUNS, rng.randint(2, 4)), rng.random() < 0.5
    word = rng.choice(words) if present else rng.choice([noun for noun in NOUNS if noun not in words])
    answers = ("yes", "no") if present else ("no", "yes")
    return Item(
        unordered("words", words),
        {"word": word, "words": ", ".join(words)},
        answers[0],
        one_of(answers[0]),
        (answers[1],),
    )


@family(
    "how many words a list has",
    train=(
        "How many words are in this list? | {words}",
        "Count the words: {words}",
        "How many words do you see here: {words}?",
        "Here is a list: {words}. How many words does it have?",
        "Count the words in the list and write the number. | {words}",
    ),
    held=("Count how many words this list has. | {words}", "Tell me how many words there are: {words}"),
)
def count_items(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(2, 7))
    n = len(words)
    return Item(
        unordered("words", words),
        {"words": ", ".join(words)},
        str(n),
        number(n),
        (str(n + 1), str(n - 1), str(n + 2)),
    )


@family(
    "words in the order of the alphabet",
    train=(
        "Put these words in alphabetical order: {words}",
        "Sort the words from a to z. | {words}",
        "Write these words in the order of the alphabet. | {words}",
        "Sort this list by the alphabet: {words}",
        "Order these words from a to z: {words}",
    ),
    held=(
        "Sort these words in alphabetical order. | {words}",
        "Can you put this list in order from a to z: {words}?",
    ),
)
def sort_words(rng: random.Random) -> Item:
    letters = rng.sample(sorted({noun[0] for noun in NOUNS}), 3)
    words = [rng.choice([noun for noun in NOUNS if noun[0] == letter]) for letter in letters]
    answer = sorted(words)
    wrong = (", ".join(shuffled(rng, answer)), ", ".join(shuffled(rng, answer)), ", ".join(answer[:-1]))
    return Item(
        unordered("words", words), {"words": ", ".join(words)}, ", ".join(answer), in_order(*answer), wrong
    )


FAMILIES = (
    repeat_word,
    first_last,
    reverse_list,
    bullet_list,
    odd_one_out,
    pick_kind,
    yes_no,
    count_items,
    sort_words,
)
