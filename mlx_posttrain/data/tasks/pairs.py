"""Preference pairs: a right, polite and complete answer against one with a single flaw.

Either answer may have a polite frame of any length, and wrong, cut off and repetitive answers consist of the
right answer's words, so that neither length nor single words give the better answer away. Answers beside the
point are included for reinforcement learning: a policy learns to exploit any fault that no pair shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mlx_posttrain.data.tasks.checks import check
from mlx_posttrain.data.tasks.courtesy import (
    CLOSINGS,
    OPENINGS,
    PROMISES,
    RUDE_CLOSINGS,
    RUDE_OPENINGS,
    frame,
)
from mlx_posttrain.data.tasks.family import Family, Row

# flaw -> relative frequency
FLAWS = {"wrong": 32, "beside the point": 20, "rude": 16, "cut off": 16, "repetitive": 16}


def _courtesy(
    rng: random.Random,
    closing: float,
    openings: tuple[str, ...] = OPENINGS,
    closings: tuple[str, ...] = CLOSINGS,
) -> tuple[str, str]:
    """Draw an opening, a closing (with the probability ``closing``), or both."""
    after = rng.choice(closings) if rng.random() < closing else ""
    return ("" if after and rng.random() < 0.5 else rng.choice(openings)), after


def _wrong(rng: random.Random, row: Row, others: Sequence[Family]) -> str:
    """Return a complete, wrong answer, mostly in a polite frame."""
    text = rng.choice([text for text in row.item.wrong if not check(row.item.checker, text)])
    return frame(text, *_courtesy(rng, 0.5)) if rng.random() < 0.8 else text


def _beside(rng: random.Random, row: Row, others: Sequence[Family]) -> str:
    """Return an answer beside the point, mostly in a polite frame.

    It is words of the question, or the answer to another question of the same family or of any.
    """
    choice = rng.random()
    if choice < 0.3:
        words = " ".join(row.family.text(row.item, row.phrasing)).split()
        first = rng.randrange(len(words))
        text = " ".join(words[first : first + rng.randint(1, 6)])
    else:
        family = row.family if choice < 0.7 else rng.choice(others)
        item = family.draw(rng)
        # no answer moves from one split to the other
        while item.held_out != row.item.held_out:
            item = family.draw(rng)
        text = item.answer
    return frame(text, *_courtesy(rng, 0.5)) if rng.random() < 0.8 else text


def _rude(rng: random.Random, row: Row, others: Sequence[Family]) -> str:
    """Return the right answer with rude phrases before it, after it, or both; one of two may be polite."""
    opening, closing = _courtesy(rng, 0.5, RUDE_OPENINGS, RUDE_CLOSINGS)
    if opening and closing and rng.random() < 0.5:
        opening, closing = rng.choice(((rng.choice(OPENINGS), closing), (opening, rng.choice(CLOSINGS))))
    return frame(row.item.answer, opening, closing)


def _cut_off(rng: random.Random, row: Row, others: Sequence[Family]) -> str:
    """Return an answer that breaks off between words, in a word, or before it begins."""
    item = row.item
    words = item.answer.split(" ")
    if len(words) > 1:
        kept = " ".join(words[: rng.randint(max(1, len(words) // 2), len(words) - 1)])
    elif len(item.answer) > 3 and rng.random() < 0.5:
        kept = item.answer[: rng.randint(len(item.answer) // 2, len(item.answer) - 1)]
    else:
        return rng.choice(PROMISES)
    return frame(kept, rng.choice(OPENINGS), "")


def _repetitive(rng: random.Random, row: Row, others: Sequence[Family]) -> str:
    """Return an answer that repeats one word, the whole answer, or its polite frame."""
    item = row.item
    opening, closing = _courtesy(rng, 0.6)
    choice, words = rng.random(), item.answer.split(" ")
    if choice < 0.5 and len(words) > 2:
        at = rng.randint(1, len(words) - 2)
        return frame(" ".join(words[:at] + [words[at]] * (len(words) - at)), opening, "")
    if choice < 0.8:
        mark = " " if item.answer[-1] in ".?!" else rng.choice((" ", ", ", ". "))
        return frame(mark.join([item.answer] * rng.choice((2, 3, 3, 4))), opening, "")
    if opening and not closing:
        return frame(item.answer, " ".join([opening] * rng.choice((2, 3))), "")
    return frame(item.answer, opening, " ".join([closing] * rng.choice((2, 3))))


_MAKERS = {
    "wrong": _wrong,
    "beside the point": _beside,
    "rude": _rude,
    "cut off": _cut_off,
    "repetitive": _repetitive,
}


def pair(row: Row, rng: random.Random, others: Sequence[Family]) -> dict[str, Any]:
    """Return one preference row: prompt, chosen, rejected, family, flaw and the task's checker.

    ``others`` are the families whose answers may be taken as answers beside the point.
    """
    item = row.item
    instruction, given = row.family.text(item, row.phrasing)
    flaw = rng.choices(list(FLAWS), list(FLAWS.values()))[0]
    for _ in range(100):
        rejected = _MAKERS[flaw](rng, row, others)
        if not check(item.checker, rejected):
            break  # by chance it may be right, for example if it was cut off to another accepted form
    else:
        raise AssertionError(f"no {flaw} answer can be made from {item}")
    return {
        "prompt": f"{instruction}\n{given}" if given else instruction,
        "chosen": frame(item.answer, *_courtesy(rng, 0.4)),
        "rejected": rejected,
        "family": row.family.name,
        "flaw": flaw,
        "checker": item.checker,
    }
