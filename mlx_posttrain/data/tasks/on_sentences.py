"""Families over sentences: changing, finishing and reading one, asking politely, telling a tiny story."""

from __future__ import annotations

import random

from mlx_posttrain.data.tasks.checks import literal, one_of, sentences
from mlx_posttrain.data.tasks.family import Item, content, family, unordered
from mlx_posttrain.data.tasks.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    NAMES,
    NOUNS,
    PLACES,
    REQUESTS,
    STORIES,
    THINGS,
    VERBS,
)


@family(
    "one word of a sentence replaced",
    train=(
        "Replace the word {old} with {new}. | {text}",
        "Change {old} to {new} in this sentence. | {text}",
        "Write {new} in place of {old}: {text}",
        "Read this: {text} Now write it with {new} in place of {old}.",
        "Write the sentence again, but change {old} to {new}. | {text}",
    ),
    held=("Put {new} in place of {old}. | {text}", "In this sentence, replace {old} with {new}: {text}"),
)
def replace_word(rng: random.Random) -> Item:
    animals, adjectives, places = rng.sample(ANIMALS, 2), rng.sample(ADJECTIVES, 2), rng.sample(PLACES, 2)
    old = [animals[0], adjectives[0], places[0]]
    at = rng.randrange(3)
    new = [pair[1] if n == at else pair[0] for n, pair in enumerate((animals, adjectives, places))]
    other = [
        pair[1] if n == (at + 1) % 3 else pair[0] for n, pair in enumerate((animals, adjectives, places))
    ]

    def text(words: list[str]) -> str:
        return f"The {words[0]} is {words[1]} in the {words[2]}."

    slots = {"old": old[at], "new": new[at], "text": text(old)}
    return Item(
        unordered("replace", [*old, new[at]]), slots, text(new), one_of(text(new)), (text(old), text(other))
    )


@family(
    "words in quotes",
    train=(
        "Put these words in quotes: {text}",
        "Write this in quotes. | {text}",
        "Put quotes around these words. | {text}",
        "Write {text} in quotes.",
        "Add quotes to this text: {text}",
    ),
    held=("Put this text in quotes. | {text}", "Can you write {text} with quotes around it?"),
)
def quotes(rng: random.Random) -> Item:
    (noun, other), adjective = rng.sample(NOUNS, 2), rng.choice((*ADJECTIVES, *COLOURS))
    text = f"the {adjective} {noun}"
    return Item(
        content("phrase", adjective, noun),
        {"text": text},
        f'"{text}"',
        literal(f'"{text}"'),
        (text, f'"{text}', f'{text}"', f'"the {adjective} {other}"'),
    )


@family(
    "a sentence about today told about yesterday",
    train=(
        "Write this in the past tense. | {text}",
        "Change to the past tense: {text}",
        "Say that this was yesterday. | {text}",
        "Tell it in the past: {text}",
        "Put this sentence in the past tense. | {text}",
    ),
    held=("Make this sentence past tense: {text}", "Write the sentence again in the past. | {text}"),
)
def past_tense(rng: random.Random) -> Item:
    (present, past, ends), other = rng.choice(VERBS), rng.choice(VERBS)
    subject = rng.choice(("I", "We", "They", "You", "The boys", "The girls", "My friends", "The children"))
    end = rng.choice(ends)
    text, answer = f"{subject} {present} {end}.", f"{subject} {past} {end}."
    wrong = (
        text,
        f"{subject} will {present} {end}.",
        f"{subject} {present}s {end}.",
        f"{subject} {other[1]} {end}.",
    )
    return Item(content("predicate", present, end), {"text": text}, answer, one_of(answer), wrong)


@family(
    "a question about two sentences",
    train=(
        "{text} {question}",
        "{question} | {text}",
        "Read this and answer. {text} {question}",
        "Read the text and answer the question: {question} | {text}",
        "Here is a text: {text} Answer this: {question}",
    ),
    held=("Answer the question. {question} | {text}", "{text} Now tell me: {question}"),
)
def reading(rng: random.Random) -> Item:
    names, things, colours, places = (
        rng.sample(NAMES, 2),
        rng.sample(THINGS, 2),
        rng.sample(COLOURS, 2),
        rng.sample(PLACES, 2),
    )
    at = rng.randrange(2)
    kind = rng.randrange(4)
    if kind < 2:
        text = f"{names[0]} is in the {places[0]}. {names[1]} is in the {places[1]}."
        rooms, told = [f"in the {place}" for place in places], places
        asked, answers = (f"Who is {rooms[at]}?", names) if kind == 0 else (f"Where is {names[at]}?", rooms)
    else:
        told = [f"{colour} {thing}" for colour, thing in zip(colours, things, strict=True)]
        text = f"{names[0]} has a {told[0]}. {names[1]} has a {told[1]}."
        asked, answers = (
            (f"Who has the {things[at]}?", names)
            if kind == 2
            else (f"What colour is the {things[at]}?", colours)
        )
    answer, wrong = answers[at], answers[1 - at]
    spec = one_of(
        answer, *([answer.removeprefix("in "), answer.removeprefix("in the ")] if kind == 1 else [])
    )
    return Item(unordered("told", told), {"text": text, "question": asked}, answer, spec, (wrong,))


@family(
    "an order turned into a polite request",
    train=(
        "Ask politely: {order}",
        "Make this a polite question. | {order}",
        "Turn this order into a polite request: {order}",
        "Say this in a polite way. | {order}",
        "How do you ask this politely: {order}?",
    ),
    held=("Write a polite request for this. | {order}", "Please make this more polite: {order}"),
)
def polite_request(rng: random.Random) -> Item:
    request, (noun, other) = rng.choice(REQUESTS), rng.sample(THINGS, 2)
    order, elsewhere = request.format(noun), request.format(other)
    spec = sentences(
        [order],
        any_of=["could you", "would you", "can you please", "please"],
        most=len(order.split()) + 5,
        ends="?.",
    )
    wrong = (f"Now {order} or go away!", f"You have to {order} at once.", f"Could you please {elsewhere}?")
    return Item(content("request", order), {"order": order}, f"Could you please {order}?", spec, wrong)


@family(
    "a very short story with three given words",
    train=(
        "Write a very short story about {name}, a {animal} and a {thing}.",
        "Tell a short story with these words: {name}, {animal}, {thing}",
        "Write a little story. Use these words. | {name}, {animal}, {thing}",
        "Tell me a tiny story about {name}, a {animal} and a {thing}.",
        "Use these words in a very short story. | {name}, {animal}, {thing}",
    ),
    held=(
        "Please tell a little story with {name}, a {animal} and a {thing}.",
        "Make a short story from these words. | {name}, {animal}, {thing}",
    ),
)
def story(rng: random.Random) -> Item:
    name, stranger = rng.sample(NAMES, 2)
    (animal, another), (thing, something) = (
        rng.sample([word for word in ANIMALS if word[0] not in "aeiou"], 2),
        rng.sample(THINGS, 2),
    )
    template = rng.choice(STORIES)
    slots = {"name": name, "animal": animal, "thing": thing}
    spec = sentences([name, animal, thing], least=8, most=32)
    wrong = tuple(
        template.format(**{**slots, **change})
        for change in ({"name": stranger}, {"animal": another}, {"thing": something})
    )
    return Item(content("story", animal, thing), slots, template.format(**slots), spec, wrong)


FAMILIES = (replace_word, quotes, past_tense, reading, polite_request, story)
