"""Which questions models are asked where none are named: the held-out rows of the first run among them.

A run's rows are read and split as in training, so that what is asked was held out there. Of other runs in the
comparison, and the runs they started from, none should have trained on what is asked either: such questions
are left out, or where no others remain they are said to be known. Runs on embedded data are asked the
embedded questions, whose splits share no content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_posttrain import runs
from mlx_posttrain.config import DataSection
from mlx_posttrain.console import log
from mlx_posttrain.data import formats, sources
from mlx_posttrain.data.labelled import labelled_collator, read_labelled
from mlx_posttrain.data.read import read_conversations, read_rows
from mlx_posttrain.data.split import opening, split_rows
from mlx_posttrain.data.types import Conversation, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import METHODS
from mlx_posttrain.models.source import Source

if TYPE_CHECKING:
    from mlx_posttrain.evaluation.suite import SuiteSection

EMBEDDED = "embedded/tasks"


class OwnRows(NamedTuple):
    """Held-out rows of a run that ask something, the texts of those that do not, and whose they are."""

    questions: list[Conversation]
    texts: list[str]
    where: str


def read(labels: Sequence[str], models: Sequence[Source], limit: int, skip: int = 0) -> OwnRows | None:
    """At most ``limit`` held-out rows of the first run, after ``skip`` of them.

    None where the embedded questions are to be asked. Prints what is asked where other runs had other rows or
    the run held nothing out. Raises UserError where its rows can no longer be read.
    """
    recipes = {label: model.recipe or {} for label, model in zip(labels, models, strict=True)}
    found = {label: recipe for label, recipe in recipes.items() if _has_rows(recipe)}
    if not found:
        return None
    first, recipe = next(iter(found.items()))
    source = str(recipe["data"]["source"])
    others = [label for label, other in found.items() if other["data"]["source"] != source]
    if others:
        log(
            f"asking what {first} was trained for ({source}); {', '.join(others)} had other rows: "
            "rows=FILE asks something else"
        )
    if source.startswith("embedded/"):
        return None
    try:
        _, held_out = _split(recipe)
    except UserError as error:
        raise UserError(
            f"the rows of {first} cannot be asked again: {error}; rows=FILE asks others"
        ) from None
    if not held_out:
        log(f"{first} held out no rows, so the embedded questions are asked; rows=FILE asks others")
        return None
    held_out, known = _unseen(held_out, first, found)
    where = f"held out from {first}'s {Path(source).name if Path(source).exists() else source}"
    if known:
        where += f" (all trained on by {known})"
    if len(held_out) > limit:
        log(f"{source}: {limit:,} of {len(held_out):,} held-out rows (limit)")
    asked = _without_repeats(held_out)[skip : skip + limit]
    if not asked:
        raise UserError(f"{source}: skip={skip:,} leaves none of {len(held_out):,} held-out rows")
    texts = [
        row.turns[-1].content for row in asked if len(row.turns) == 1 and row.turns[0].role == "assistant"
    ]
    return OwnRows([row for row in asked if len(row.turns) > 1], texts, where)


def _has_rows(recipe: Mapping[str, Any] | None) -> bool:
    return isinstance((recipe or {}).get("data"), dict)


def _split(recipe: Mapping[str, Any]) -> tuple[list[formats.Record], list[formats.Record]]:
    """A run's training and held-out rows, read as its method reads them."""
    data = DataSection(**recipe["data"])
    reader: Callable[..., list[Any]] = read_conversations if data.clean else read_rows
    if _is_labelled(recipe):  # a pair is two rows
        reader = read_labelled
    return split_rows(data, int(recipe.get("seed", 0)), reader)


def _is_labelled(recipe: Mapping[str, Any]) -> bool:
    method = METHODS.get(str(recipe.get("method")))
    return method is not None and method.collator is labelled_collator


def _unseen(
    held_out: list[formats.Record], first: str, recipes: Mapping[str, Mapping[str, Any]]
) -> tuple[list[formats.Record], str]:
    """(rows whose question no other run, and none that a run started from, trained on; "").

    All rows, and who trained on them, where none would be left.
    """
    own = _of_rows(recipes[first])
    known: list[tuple[Any, ...]] = [own]
    for label, recipe in recipes.items():
        for name, trained in _ancestry(label, recipe):
            if (key := _of_rows(trained)) in known:
                continue
            known.append(key)
            try:
                asked = {opening(row) for row in _split(trained)[0]}
            except UserError as error:
                log(f"whether {name} was trained on these questions is not known: {error}")
                continue
            kept = [row for row in held_out if opening(row) not in asked]
            if not kept:
                log(f"{name} trained on every row that {first} held out: rows=FILE asks new ones")
                return held_out, name
            if len(kept) < len(held_out):
                log(f"{len(held_out) - len(kept)} of {len(held_out)} rows left out: {name} trained on them")
            held_out = kept
    return held_out, ""


def _of_rows(recipe: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides which rows a run trained on."""
    data = DataSection(**recipe["data"])
    asked = {"template", "system", "train_on", "max_length", "too_long", "pack"}
    return data.model_dump(exclude=asked), recipe.get("seed", 0), _is_labelled(recipe)


def _ancestry(label: str, recipe: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A run and those it started from, as far as they still exist, that were trained on rows of their own."""
    found = [(label, recipe)]
    while runs.is_run(name := str(recipe.get("model", ""))) and len(found) < 100:
        recipe = runs.reopen(name)[1]
        if _has_rows(recipe):
            found.append((name, recipe))
    return found


def _without_repeats(rows: Sequence[formats.Record]) -> list[Conversation]:
    """Rows as conversations, one for each prompt of pairs and labelled answers: with a good one, or none."""
    found: dict[Any, Conversation] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Conversation):
            ends = row.turns[-1].role == "assistant"
            turns = row.turns if ends else (*row.turns, Turn("assistant", ""))
            found[number] = Conversation(turns, row.templated, row.extra)
            continue
        good = row.chosen if isinstance(row, Preference) else row.completion if row.label else ""
        before = found.get(row.prompt)
        if before is None or (good and not before.turns[-1].content):
            turns = (*row.prompt, Turn("assistant", good))
            found[row.prompt] = Conversation(turns, row.templated, row.extra)
    return list(found.values())


def with_rows(suite: SuiteSection, models: Sequence[Source]) -> SuiteSection:
    """The suite with embedded questions where it names none, else with the first run's ``data.columns``."""
    recipe = next((model.recipe for model in models if model.recipe and model.recipe.get("data")), None)
    if suite.rows is None:
        if recipe is None:
            log(f"no run here says what to ask: asking {EMBEDDED}; rows=FILE asks your own questions")
        return suite.model_copy(update={"rows": EMBEDDED})
    columns = (recipe or {}).get("data", {}).get("columns") or {}
    if not suite.columns and columns and sources.is_file(suite.rows):
        (row,) = sources.load_rows(suite.rows, limit=1)
        if set(columns.values()) <= set(row):
            return suite.model_copy(update={"columns": columns})
    return suite


def with_extras(row: Conversation, held_out: str = "content") -> Conversation:
    """A question with what its answer is checked by, and how it is new."""
    extra = {**row.extra, "held_out": held_out}
    if row.turns[-1].content:
        extra.setdefault("answer", row.turns[-1].content)
    return Conversation(row.turns, row.templated, extra)
