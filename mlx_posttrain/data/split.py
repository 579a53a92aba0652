"""Which rows train and which are held out: of one source, or of a mixture of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from mlx_posttrain.config import DataSection
from mlx_posttrain.console import log
from mlx_posttrain.data import drops, formats, mixture, sources
from mlx_posttrain.data.types import Conversation, Preference
from mlx_posttrain.errors import UserError

Record = TypeVar("Record", bound=formats.Record)
#: How many times its share is read of a source, so that rows that are dropped are made up for.
AHEAD = 1.25


def opening(record: formats.Record) -> str:
    """The question that a record begins with, or its text where it asks nothing.

    In lower case and with single spaces.
    """
    if isinstance(record, Conversation):
        turns, otherwise = record.turns, record.turns[-1].content
    else:
        turns = record.prompt
        otherwise = record.chosen if isinstance(record, Preference) else record.completion
    asked = next((turn.content for turn in turns if turn.role == "user"), "")
    return " ".join((asked if asked.strip() else otherwise).casefold().split())


def split_rows(
    data: DataSection, seed: int, read: Callable[..., list[Record]]
) -> tuple[list[Record], list[Record]]:
    """Training and held-out rows: from a split of the source, or rows set aside by seed.

    Rows that begin with the same question stay together: a row whose prompt was trained on tells nothing
    about new prompts. A split that the source comes with is left as it is, and what it shares is printed.
    Of a mixture see :func:`_split_mixture`. read: as :func:`mlx_posttrain.data.read.read_conversations`.
    """
    if data.sources is not None:
        return _split_mixture(data, seed, read)
    train = read(data, split=data.split, limit=data.limit, seed=seed)
    eval_split = _own_split(data)
    if eval_split:
        held_out = read(data, split=eval_split, limit=data.eval_limit, seed=seed)
        _say_shared(data, eval_split, train, held_out)
        return train, held_out
    aside = min(_rows_aside(data, len(train)), len(train) - 1)
    questions = [opening(row) for row in train]
    chosen = _groups_aside(questions, aside, np.random.default_rng([seed, 0xE7A1]))
    if aside and not chosen:
        log(f"{data.origin}: all rows begin with the same question, so none are held out")
    elif aside and len(set(questions)) < len(questions):
        asked = {questions[i] for i in chosen}
        again = len(questions) - len(set(questions))
        log(
            f"{data.origin}: {len(chosen):,} of {len(train):,} rows held out, {len(asked):,} of "
            f"{len(set(questions)):,} questions; no question is on both sides; "
            f"{again:,} {'row repeats' if again == 1 else 'rows repeat'} a question"
        )
    return [c for i, c in enumerate(train) if i not in chosen], [
        c for i, c in enumerate(train) if i in chosen
    ]


def _say_shared(
    data: DataSection, split: str, train: Sequence[formats.Record], held_out: Sequence[formats.Record]
) -> None:
    trained = {opening(row) for row in train}
    shared = sum(opening(row) in trained for row in held_out)
    if shared:
        log(
            f"{data.origin}: {shared:,} of {len(held_out):,} rows of the split {split!r} begin with a "
            "question that is also trained on"
        )


def _own_split(data: DataSection) -> str | None:
    """The split of its source that a section evaluates on; None where rows are set aside."""
    split = data.eval_split or ("valid" if data.source in sources.GENERATED else None)
    if split and data.source is not None and sources.is_file(data.source):
        log(
            f"{data.origin}: a file is one split and has no {split!r} beside it (data.eval_split), so rows "
            "of it are held out"
        )
        return None
    return split


def _rows_aside(data: DataSection, rows: int) -> int:
    """How many of ``rows`` are to be held out. Raises UserError where none would be left."""
    if data.holdout >= rows:
        raise UserError(f"data.holdout={data.holdout:g} leaves none of {rows} rows to train on; lower it")
    aside = int(data.holdout if data.holdout >= 1 else round(data.holdout * rows))
    return min(aside, data.eval_limit or aside)


def _groups_aside(
    questions: list[str],
    aside: int,
    rng: np.random.Generator,
    held_out: Collection[str] = (),
    trained: Collection[str] = (),
) -> set[int]:
    """Numbers of about ``aside`` rows, every row of a question or none.

    Questions come in the order in which a permutation of the rows meets them; one with more rows than are
    still wanted is passed over. Where each has too many, the one with the fewest rows is taken. held_out,
    trained: questions on whose side other sources have decided.
    """
    members: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        members.setdefault(question, []).append(number)
    chosen = {number for number, question in enumerate(questions) if question in held_out}
    for number in rng.permutation(len(questions)).tolist():
        group = members[questions[number]]
        if number not in chosen and questions[number] not in trained and len(chosen) + len(group) <= aside:
            chosen.update(group)
    free = [question for question in members if question not in trained]
    if aside and not chosen and free and len(members) > 1:
        chosen = set(members[min(free, key=lambda question: len(members[question]))])
    return chosen


def read_parts(data: DataSection, seed: int, read: Callable[..., list[Record]]) -> dict[str, list[Record]]:
    """The rows that each source gives to a mixture, by its name; of one source all its rows, by "".

    A source of a limited mixture is read ``AHEAD`` of its share, so that rows that are dropped are made up
    for. Prints how large the mixture is and why. Raises UserError where a source gives none.
    """
    if data.sources is None:
        return {"": read(data, split=data.split, limit=data.limit, seed=seed)}
    weights = [one.weight for one in data.sources if one.weight is not None]
    found: list[list[Record]] = []
    for number, (name, part) in enumerate(data.parts.items()):
        most = part.limit
        if data.limit is not None and weights:
            ahead = math.ceil(AHEAD * data.limit * weights[number] / sum(weights))
            most = min(most or ahead, ahead)
        rows = read(part, split=part.split, limit=most, seed=seed)
        found.append([replace(row, source=name) for row in rows])
    available = [len(rows) for rows in found]
    taken = mixture.counts(available, weights or None, data.limit)
    numbers = dict(zip(data.parts, taken, strict=True))
    if nothing := [name for name, n in numbers.items() if not n]:
        raise UserError(
            f"data.sources: {nothing[0]} gives none of {sum(taken):,} rows: raise data.limit or its weight"
        )
    line = f"mixture of {sum(taken):,} rows: {mixture.described(numbers)}"
    if weights and sum(taken) < (data.limit or sum(available)):
        short = min(range(len(found)), key=lambda i: available[i] / weights[i])
        line += f"; {list(numbers)[short]} has no more for its share, and no row is taken twice"
    log(line)
    return {name: rows[:n] for (name, n), rows in zip(numbers.items(), found, strict=True)}


def _split_mixture(
    data: DataSection, seed: int, read: Callable[..., list[Record]]
) -> tuple[list[Record], list[Record]]:
    """Training and held-out rows of several sources, interleaved.

    Sources are split in the order in which they are named, each as it would be alone, but for questions that
    another has: one that a source before it holds out, or the split of any, is held out, and one that those
    train on is trained on. Of sources with a split of their own, training rows whose question another holds
    out are dropped. Held-out rows are divided among the sources as the mixture is.
    """
    train, held_out = read_parts(data, seed, read), {}
    whole = sum(map(len, train.values()))
    shares = [len(rows) / whole for rows in train.values()]
    own = {name: split for name, part in data.parts.items() if (split := _own_split(part))}
    most = mixture.divide(data.eval_limit, shares) if data.eval_limit else [None] * len(shares)
    aside = mixture.divide(_rows_aside(data, whole), shares) if len(own) < len(train) else []
    for limit, (name, part) in zip(most, data.parts.items(), strict=True):
        if name in own:
            rows = read(part, split=own[name], limit=limit and max(1, limit), seed=seed)
            held_out[name] = [replace(row, source=name) for row in rows]
            _say_shared(part, own[name], train[name], held_out[name])
    unseen = {name: {opening(row) for row in rows} for name, rows in held_out.items()}
    trained = {opening(row) for name in own for row in train[name]}
    for number, (name, rows) in enumerate(train.items()):
        if name not in own:
            questions = [opening(row) for row in rows]
            rng = np.random.default_rng([seed, 0xE7A1])
            chosen = _groups_aside(
                questions, min(aside[number], len(rows) - 1), rng, set().union(*unseen.values()), trained
            )
            held_out[name] = [rows[i] for i in sorted(chosen)]
            train[name] = [row for i, row in enumerate(rows) if i not in chosen]
            unseen[name] = {questions[i] for i in chosen}
            trained |= {*questions} - unseen[name]
    for name, rows in train.items():
        others = set().union(*(questions for other, questions in unseen.items() if other != name))
        train[name] = [row for row in rows if opening(row) not in others]
        if lost := len(rows) - len(train[name]):
            log(f"{name}: {lost:,} rows dropped: another source holds their question out")
            drops.add({"held out of another source": lost})
        if not train[name]:
            raise UserError(f"data.sources: no row of {name} is left: other sources hold its questions out")
    for what, parts in (("trained on", train), ("held out", held_out)):
        numbers = {name: len(parts[name]) for name in train}
        log(f"{what}: {sum(numbers.values()):,} rows: {mixture.described(numbers)}")
    return mixture.interleave(train.values()), mixture.interleave(held_out[name] for name in train)
