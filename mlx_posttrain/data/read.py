"""A recipe's rows: read, cleaned, split and encoded; what is dropped is printed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mlx_posttrain.config import DataSection, Recipe
from mlx_posttrain.console import log
from mlx_posttrain.convert import hub
from mlx_posttrain.data import drops, encode, formats, mixture, ranked, sources
from mlx_posttrain.data.advice import Wants, for_method, guess, short
from mlx_posttrain.data.dataset import Collator, Dataset, RowCollator
from mlx_posttrain.data.jinja import is_ours
from mlx_posttrain.data.pairs import PairCollator, encode_pairs
from mlx_posttrain.data.split import split_rows
from mlx_posttrain.data.summary import summarize
from mlx_posttrain.data.tokens import written_specials
from mlx_posttrain.data.types import Conversation, Example, Pair, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.tokenizer import load_tokenizer, pad_id
from mlx_posttrain.yaml_text import flow

Record = TypeVar("Record", bound=formats.Record)
SHOWN = 12  # columns that are named in one line
TRIED_ROWS = 8  # whose prompts are looked at: what a chat template does wrong it does to every row
#: Rows to evaluate on are worth having, and a run can do without them.
NONE_HELD_OUT = (
    "{what}: none of them can be used as data.max_length stands, so nothing is evaluated during training"
)


def read_rows(
    data: DataSection, *, split: str, limit: int | None, seed: int, wants: Wants = "answers"
) -> list[formats.Record]:
    """The rows of one split of one source as records; prints what was dropped.

    wants: what they are for, see :func:`mlx_posttrain.data.formats.parse_all`.
    """
    assert data.source is not None
    trained = split == data.split
    own_limit = data.limit if trained else data.eval_limit
    rows = sources.load_rows(
        data.source,
        split=split,
        config=data.config,
        limit=limit,
        seed=seed,
        shuffle=data.shuffle,
        families=data.families,
        split_key="data.split" if trained else "data.eval_split",
        limit_key=None if limit != own_limit else "data.limit" if trained else "data.eval_limit",
    )
    unfilled: Counter[str] = Counter()
    if data.prompt is not None:
        rows, unfilled = formats.fill_prompts(rows, data.prompt, data.origin)
    parsed = formats.parse_all(
        rows,
        format=data.format,
        columns=data.columns,
        source=data.origin,
        ranked=data.ranked,
        seed=seed,
        wants=wants,
    )
    dropped = unfilled + parsed.dropped
    for reason, count in dropped.items():
        unit = "pairs left out" if reason == formats.TIES else "rows dropped"
        log(f"{data.origin} {split}: {count} {unit}: {reason}")
    if data.ranked != "best_worst" and split == data.split and not ranked.among(rows, data.columns):
        log(f"data.ranked={data.ranked} is not used: these rows have no list of answers with scores")
    if split == data.split:
        drops.add({reason: count for reason, count in dropped.items() if reason != formats.TIES})
    known = sources.is_hub_id(data.source) or data.config in sources.CONFIGURATIONS.get(data.source, ())
    if data.config is not None and split == data.split and not known:
        log(
            f"data.config={data.config} is not used: only data sets on the hub have configurations, and "
            f"{data.origin} is none"
        )
    further = [ours for ours in data.columns if ours not in formats.COLUMNS]
    if split == data.split and not data.source.startswith("embedded/"):
        asked = re.findall(r"\{(\w+)\}", data.prompt or "")
        say_unread(data.origin, parsed, {*further, *asked})
    if further and split == data.split:
        log(
            f"data.columns: no format reads {', '.join(further)}; kept beside the rows for checks and "
            "reward functions"
        )
    return parsed.records


def say_unread(source: str, parsed: formats.Parsed, known: Collection[str]) -> None:
    """Print, in one line, which columns but the ``known`` ones the rows' format does not read."""
    names = [short(name) for name in parsed.unread if name not in known]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        log(f"{source}: read as {parsed.format}; columns it does not read: {', '.join(names[:SHOWN])}{more}")


def with_system(row: Record, system: str | None) -> Record:
    """The row with a system prompt before it, unless it has one already or uses no template."""
    name = "turns" if isinstance(row, Conversation) else "prompt"
    turns = getattr(row, name)
    if system is None or not row.templated or (turns and turns[0].role == "system"):
        return row
    changed: Any = {name: (Turn("system", system), *turns)}
    return replace(row, **changed)


def read_conversations(data: DataSection, *, split: str, limit: int | None, seed: int) -> list[Conversation]:
    """The rows of one split as conversations, cleaned if the recipe says so; prints what was dropped."""
    parsed = read_rows(data, split=split, limit=limit, seed=seed)
    conversations = [row for row in parsed if isinstance(row, Conversation)]
    if len(conversations) < len(parsed):
        raise UserError(
            f"{data.origin}: these are {type(parsed[0]).__name__.lower()} rows, and this method imitates "
            "one answer: "
            "say which with data.format=chosen, or with data.columns, for example {prompt: prompt, "
            "completion: chosen}"
        )
    if any(row.turns[-1].role != "assistant" for row in conversations):
        raise UserError(
            f"{data.origin}: these rows have a prompt and no answer to imitate; "
            f"{_named_answer(data, conversations[0])}"
        )
    conversations = [with_system(c, data.system) for c in conversations]
    if data.clean is not None:
        from mlx_posttrain.data import quality

        conversations, cleaned = quality.clean(conversations, seed=seed, **data.clean.model_dump())
        log(
            "cleaning dropped "
            + ", ".join(f"{reason} {count}" for reason, count in cleaned.items())
            + f"; {len(conversations)} rows kept"
        )
        if split == data.split:
            drops.add({f"cleaned: {reason}": count for reason, count in cleaned.items()})
    return conversations


def _named_answer(data: DataSection, row: Conversation) -> str:
    """How to say which column of prompts' rows is the answer."""
    ours = guess("answer", row.extra)
    theirs = "your_column" if ours is None else data.columns.get(ours, ours)
    others = {name: column for name, column in data.columns.items() if name != ours}
    columns = flow({**others, "response": theirs})
    where = "with data.prompt, " if data.prompt is not None else ""
    return (
        f"{where}name its column: data.columns='{columns}', or `completion` in place of `response` for a "
        "text that goes on, without a template"
    )


def encode_rows(
    conversations: list[Conversation],
    data: DataSection,
    tokenizer: Any,
    context: int | None,
    seed: int,
    what: str,
    *,
    needed: bool = True,
) -> list[Example]:
    """Conversations as examples of at most the recipe's and the model's length.

    Rows of a mixture are encoded as their source says. Prints what was dropped and cut.

    Raises UserError when none is left of rows that are ``needed``.
    """
    if data.sources is not None:
        return mixture.encode_by_source(
            conversations,
            data,
            lambda rows, part, name: encode_rows(
                rows, part, tokenizer, context, seed, f"{what} of {name}", needed=needed
            ),
        )
    if not conversations:
        return []
    say_specials(([turn.content for turn in c.turns] for c in conversations), tokenizer, what)
    length = min(data.max_length, context or data.max_length)
    if data.pack:
        examples = encode.pack([c.turns[-1].content for c in conversations], tokenizer, length, needed=needed)
    else:
        names = [data.template] if isinstance(data.template, str) else data.template
        truncate: encode.Truncate = "response" if data.too_long == "cut" else "drop"
        examples, report = encode.encode_all(
            conversations,
            tokenizer,
            templates=names,
            max_length=length,
            train_on=data.train_on,
            seed=seed,
            truncate=truncate,
            needed=needed,
        )
        log(f"{what}: {report}")
        if needed:
            drops.add(report.dropped)
        if needed and "chat" in names and torn_prompts(conversations[:TRIED_ROWS], tokenizer):
            log(
                f"{what}: the tokenizer makes other tokens of the end of the chat template's prompt where an "
                "answer follows, so answers are generated from other ids than they are trained on; another "
                "data.template avoids that"
            )
    if not examples:
        log(NONE_HELD_OUT.format(what=what))
    return examples


def torn_prompts(conversations: Sequence[Conversation], tokenizer: Any) -> int:
    """Return how many rows under the template "chat" do not begin with the ids of their prompt.

    Their tokenizer makes other tokens of the end of the prompt where an answer follows.
    """
    rows = [c for c in conversations if c.templated]
    prompts = encode.try_prompts([c.turns[:-1] for c in rows], tokenizer, "chat")
    whole = encode.encode_each(rows, tokenizer, templates=["chat"], max_length=2**31)
    return sum(
        row.example is not None
        and not isinstance(ids, UserError)
        and row.example.tokens[: len(ids)] != tuple(ids)
        for row, ids in zip(whole, prompts, strict=True)
    )


def say_specials(texts: Iterable[Iterable[str]], tokenizer: Any, what: str) -> None:
    """Print in how many rows of texts special tokens are written out.

    They become the tokens themselves, as in transformers and TRL: an end of text in an answer teaches a model
    to stop there, and a turn's mark in a question forges a turn.
    """
    count, first = written_specials(tokenizer, texts)
    if count:
        log(f"{what}: {count:,} have special tokens in their text, such as {first!r}, which act as such")


@dataclass(frozen=True)
class ModelFacts:
    """What a dataset needs to know of a model: its tokenizer, longest sequence in tokens, and config.json.

    new_tokens: ids that the recipe adds to the vocabulary, or whose rows an adapter to start from has.
    vocabulary: rows that the embedding then needs; 0: as many as it has.
    """

    tokenizer: Any
    context: int | None
    config: Mapping[str, Any]
    new_tokens: tuple[int, ...] = ()
    vocabulary: int = 0

    @property
    def pad(self) -> int:
        """See :func:`mlx_posttrain.models.tokenizer.pad_id`."""
        return pad_id(dict(self.config), self.tokenizer)


def model_facts(folder: Path) -> ModelFacts:
    """The facts of a model folder; loads no weights. Raises UserError for a folder that is no model."""
    config = hub.check_config(folder)
    context = config.get("n_positions") or config.get("max_position_embeddings")
    return ModelFacts(load_tokenizer(folder), context, config)


def row_collator(recipe: Recipe, facts: ModelFacts) -> Collator:
    """Rows: every trained token is a position."""
    return RowCollator(facts.context)


def pair_collator(recipe: Recipe, facts: ModelFacts) -> Collator:
    """Pairs for losses of log-probabilities: every token of an answer is a position."""
    return PairCollator(facts.pad, facts.context, score=False)


def scored_pair_collator(recipe: Recipe, facts: ModelFacts) -> Collator:
    """Pairs for losses of scores: each row has one position, that of its score."""
    return PairCollator(facts.pad, facts.context, score=True)


def row_dataset(
    recipe: Recipe,
    facts: ModelFacts,
    collate: Collator,
    prepare: Callable[[list[Conversation]], list[Conversation]] = lambda rows: rows,
) -> Dataset:
    """A recipe's rows as a dataset of examples; prints what was dropped.

    prepare: changes the training rows. Raises UserError where rows and ``data.pack`` do not go together, and
    as reading does.
    """
    data, seed = recipe.data, recipe.seed
    train, held_out = split_rows(data, seed, read_conversations)
    describe(train)
    say_own_chat(data, facts.tokenizer, any(row.templated for row in train))
    train = prepare(train)
    if data.pack and any(row.templated for row in train):
        raise UserError(
            "data.pack joins plain text: these rows have prompts; leave out data.pack, or give "
            "rows with a column 'text'"
        )

    def encoded(rows: list[Conversation], what: str, needed: bool) -> list[Example]:
        return encode_rows(rows, data, facts.tokenizer, facts.context, seed, what, needed=needed)

    return Dataset(
        encoded(train, "training rows", True),
        encoded(held_out, "held-out rows", False),
        collate,
        recipe.train,  # type: ignore[arg-type]
        seed,
        train_rows=train,
        held_out_rows=held_out,
        untemplated=not any(row.templated for row in train),
    )


def read_preferences(data: DataSection, *, split: str, limit: int | None, seed: int) -> list[Preference]:
    """The pairs of one split; prints what was dropped. Raises UserError for rows that are no pairs."""
    parsed = read_rows(data, split=split, limit=limit, seed=seed, wants="pairs")
    preferences = [row for row in parsed if isinstance(row, Preference)]
    if len(preferences) < len(parsed):
        raise UserError(
            f"{data.origin}: this method learns from pairs: rows with prompt, chosen and rejected, or chosen "
            f"and rejected dialogues{_named_pairs(data, parsed[0])}"
        )
    return [with_system(row, data.system) for row in preferences]


def _named_pairs(data: DataSection, row: formats.Record) -> str:
    """Which columns of these rows seem to be the two answers, to be said; empty where none do."""
    mended = for_method(["prompt", *row.extra], data.columns, "pairs")
    told = not any(name.startswith("your_") for name in mended.values())
    return f"; rename with data.columns='{flow(mended)}'" if told else ""


def describe(train: Sequence[formats.Record]) -> None:
    """Print what the training rows look like as a whole."""
    log("\n".join(f"training rows: {line}" for line in summarize(train).lines()))


def say_own_chat(data: DataSection, tokenizer: Any, templated: bool) -> None:
    """Print that the model has a chat template of its own where no row of ``templated`` ones uses it.

    That of a run of ours is its recipe's template, and no model's own.
    """
    parts = [part.template for part in data.parts.values()]
    names = {name for given in parts for name in ([given] if isinstance(given, str) else given)}
    own = getattr(tokenizer, "chat_template", None)
    if templated and own and "chat" not in names and not is_ours(str(own)):
        log("this model has a chat template of its own; data.template=chat uses it")


def pair_dataset(recipe: Recipe, facts: ModelFacts, collate: Collator) -> Dataset:
    """A recipe's preference pairs as a dataset, pairs of one prompt together; prints what was dropped."""
    data = recipe.data
    train, held_out = split_rows(data, recipe.seed, read_preferences)
    describe(train)
    say_own_chat(data, facts.tokenizer, any(row.templated for row in train))
    length = min(data.max_length, facts.context or data.max_length)

    def encoded(rows: list[Preference], what: str, needed: bool) -> list[Pair]:
        if not rows:
            return []
        texts = ([*(turn.content for turn in row.prompt), row.chosen, row.rejected] for row in rows)
        say_specials(texts, facts.tokenizer, what)
        pairs, report = encode_pairs(
            rows, facts.tokenizer, template=mixture.templates(rows, data), max_length=length, needed=needed
        )
        log(f"{what}: {report}")
        if needed:
            drops.add(report.dropped)
        if not pairs:
            log(NONE_HELD_OUT.format(what=what))
        return pairs

    training = encoded(train, "training pairs", True)
    return Dataset(
        training,
        encoded(held_out, "held-out pairs", False),
        collate,
        recipe.train,  # type: ignore[arg-type]
        recipe.seed,
        groups=[pair.prompt for pair in training],
        train_rows=train,
        held_out_rows=held_out,
    )
