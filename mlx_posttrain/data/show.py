"""A recipe's training rows as the model sees them: which tokens are trained, and what was dropped and why."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_posttrain.data import drops
from mlx_posttrain.data.mixture import described
from mlx_posttrain.data.types import Example, Pair
from mlx_posttrain.errors import UserError

TRAINED = ("[[", "]]")  # around trained tokens where there is no colour
COLOUR = ("\x1b[1;32m", "\x1b[0m")


@dataclass(frozen=True)
class Shown:
    """The training rows of a recipe.

    rows: for each row the sequences that a model reads of it: one, or the two answers of a pair, the chosen
    one first. names: what they are called. dropped: rows by reason. tokenizer: the model's. sources: of each
    row the name of its source in a mixture.
    """

    rows: Sequence[Sequence[Example]]
    names: Sequence[str]
    dropped: Counter[str]
    tokenizer: Any
    sources: Sequence[str]

    @property
    def totals(self) -> dict[str, Any]:
        """``rows`` read for training, ``kept``, ``dropped`` by reason, and ``trained_tokens`` of the kept.

        Of a mixture also the ``sources`` of the kept.
        """
        dropped = dict(self.dropped)
        trained = sum(sum(e.trained) for row in self.rows for e in row)
        return {
            "rows": len(self.rows) + sum(dropped.values()),
            "kept": len(self.rows),
            "dropped": dropped,
            "trained_tokens": trained,
            **({"sources": dict(Counter(self.sources))} if any(self.sources) else {}),
        }


def read(recipe: Any) -> Shown:
    """The training rows of a recipe; loads no weights and writes nothing.

    Raises UserError as running it does, and for a recipe that trains nothing.
    """
    from mlx_posttrain import engines, methods
    from mlx_posttrain.rl import prompts
    from mlx_posttrain.training.setup import shape_facts

    method = methods.get(recipe.method)
    if method.trains_on is None:
        raise UserError(
            f"{recipe.method} reads no rows itself: name one of its stages' recipes, or a recipe that trains"
        )
    with TemporaryDirectory() as scratch, drops.collect() as dropped:
        made = method.start and method.start(recipe, Path(scratch))
        _, facts = shape_facts(engines.get(recipe.engine), recipe, made)
        if method.trains_on == "rollouts":
            rollout = recipe.rollout.max_tokens
            asked, _ = prompts.read(recipe.data, facts.tokenizer, facts.context, rollout, recipe.seed)
            rows = [(Example(p.tokens, (False,) * len(p.tokens)),) for p in asked]
            return Shown(rows, ("prompt",), dropped, facts.tokenizer, [p.source for p in asked])
        dataset = method.make_dataset(recipe, facts)
        names = ("chosen", "rejected") if isinstance(dataset.train[0], Pair) else ("row",)
        # of an item only what it trains: a labelled answer's mismatched one is for comparison
        found = [dataset.collate.examples(item)[: len(names)] for item in dataset.train]
        return Shown(found, names, dropped, facts.tokenizer, [item.source for item in dataset.train])


def pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in runs of trained and of other tokens, which joined are the whole text.

    A run is what the text grows by with its tokens. Where a run ends inside a character, the part of it shows
    as a replacement character, and the run's own text is taken.
    """
    found: list[tuple[str, bool]] = []
    before, end = "", 0
    for trained, run in groupby(example.trained):
        begin, end = end, end + len(list(run))
        text = tokenizer.decode(example.tokens[:end], clean_up_tokenization_spaces=False)
        grown = text.startswith(before)
        own = text[len(before) :] if grown else tokenizer.decode(example.tokens[begin:end])
        found.append((own, trained))
        before = text
    return found


def to_json(shown: Shown, limit: int | None) -> Iterator[str]:
    """A line for each of the first ``limit`` rows, and one of totals.

    A row is {"pieces": [[text, trained], ...], "ids": [...]}, that of a pair the chosen answer's, with the
    same of the other under "rejected"; of a mixture it has its "source".
    """

    def one(example: Example) -> dict[str, Any]:
        return {
            "pieces": [list(piece) for piece in pieces(example, shown.tokenizer)],
            "ids": list(example.tokens),
        }

    for (first, *others), source in zip(shown.rows[:limit], shown.sources, strict=False):
        row = one(first) | ({"rejected": one(others[0])} if others else {})
        row |= {"source": source} if source else {}
        yield json.dumps(row, ensure_ascii=False)
    yield json.dumps(shown.totals, ensure_ascii=False)


def to_text(shown: Shown, limit: int | None, colour: bool) -> Iterator[str]:
    """The first ``limit`` rows and the totals for people; trained tokens are green, or in brackets."""
    begin, end = COLOUR if colour else TRAINED
    for number, (row, source) in enumerate(zip(shown.rows[:limit], shown.sources, strict=False), 1):
        for name, example in zip(shown.names, row, strict=True):
            which = str(number) if name == "row" else f"{number} {name}"
            which += f" of {source}" if source else ""
            yield f"--- {which}: {len(example.tokens):,} tokens, {sum(example.trained):,} trained"
            yield "".join(
                f"{begin}{_printable(text)}{end}" if trained else _printable(text)
                for text, trained in pieces(example, shown.tokenizer)
            )
    totals = shown.totals
    reasons = ", ".join(f"{count:,} ({reason})" for reason, count in totals["dropped"].items())
    trained = f"rows are trained on, with {totals['trained_tokens']:,} trained tokens"
    use = "prompts are there to be answered" if shown.names == ("prompt",) else trained
    yield (
        f"--- {totals['kept']:,} of {totals['rows']:,} {use}; dropped: {reasons or 'none'}"
        + (f"; {described(totals['sources'])}" if "sources" in totals else "")
    )


def _printable(text: str) -> str:
    """The text with control characters, which a terminal would act on, written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def has_colour() -> bool:
    """Whether standard output shows colours: a terminal, without NO_COLOR and TERM=dumb."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
