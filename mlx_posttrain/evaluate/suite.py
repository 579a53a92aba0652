"""One set of questions, texts and settings for every model, and what each of them did with it: the comparison
of stages.

Every model meets the same rows and the same decoding, each asked as it was trained to be (evaluate/ask.py).
What comes out is a comparison.Comparison.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mlx_posttrain import config
from mlx_posttrain.console import say
from mlx_posttrain.data import encode, formats, sources
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import ask, measure
from mlx_posttrain.evaluate.comparison import PER_TOKEN, Comparison, Measured, Values
from mlx_posttrain.evaluate.metrics import distinct_by_text, diversity, seq_rep_n
from mlx_posttrain.evaluate.preference import length_controlled_wins
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source, locate
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards import verify


class SuiteSection(config.Section):
    """What models are compared on. Every key may be set on the command line of ``compare`` and ``eval`` as
    well.
    """

    rows: str = Field(
        "embedded/tasks",
        description="questions: embedded data, a file, or a hub id; answers are checked by the rows' rules",
    )
    split: str | None = Field(
        None, description="split of the questions; null: the held-out one of embedded data, else `train`"
    )
    config: str | None = Field(None, description="configuration name of a Hugging Face data set of questions")
    format: str = Field("auto", description="shape of a question's row, as data.format")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our column name: the file's column name"
    )
    families: list[str] | None = Field(None, description="kinds of embedded questions to take; null: all")
    limit: int = Field(160, ge=1, description="ask this many questions, and with `phrasings` as many again")
    phrasings: bool = Field(
        True, description="with embedded/tasks: ask known contents in unseen words as well"
    )
    template: str = Field(
        ask.OWN,
        description="own: each as it was trained, a model that is no run as most of the runs; or one for all",
    )
    max_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    think_tokens: int | None = Field(
        None, ge=1, description="that of a distilled run, thought and answer; null: its longest training row"
    )
    samples: int = Field(
        4, ge=0, description="sampled answers and continuations beside each greedy one; 0: none"
    )
    temperature: float = Field(0.7, gt=0, description="temperature of what is sampled")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of what is sampled")
    texts: str | None = Field(
        "embedded", description="base text: `embedded`, or a file with a column text; null: none"
    )
    text_config: str | None = Field(
        None, description="configuration name of a Hugging Face data set of base texts"
    )
    text_split: str = Field("train", description="its split, or that of a folder's file")
    text_limit: int | None = Field(100, ge=1, description="read at most this many base texts; null: all")
    join: bool = Field(
        False,
        description="read the base texts as one, with blank lines between: WikiText's on the hub are lines",
    )
    window: int | None = Field(
        None, ge=1, description="tokens a model reads base text in at a time; null: its context, at most 512"
    )
    stride: int | None = Field(None, ge=1, description="tokens from one window to the next; null: the window")
    last_words: str | None = Field(
        None, description="a file with a column text whose last word is to be guessed (LAMBADA); null: none"
    )
    opening_words: int = Field(
        12,
        ge=1,
        description="words of each base text (of the first 200) that are continued, to see what repeats",
    )
    continuation: int = Field(64, ge=8, description="tokens of each continuation")
    reward: str | None = Field(
        None, description="a reward-model run or sequence classifier that scores the answers; null: none"
    )
    seed: int = Field(
        0,
        ge=0,
        description="fixes what is sampled, and what intervals, tests and an analysis draw; greedy "
        "text draws nothing",
    )


OPENINGS = 200  # base texts that are continued at most


def compare(
    names: Sequence[str],
    suite: SuiteSection,
    engine: str = "auto",
    labels: Sequence[str] | None = None,
    origins: Sequence[int] | None = None,
) -> Comparison:
    """Measure every model on the suite; differences, the KL and wins are against the first, or where given
    the one at ``origins``.

    names: whatever ``loading.locate`` knows; origins: for each model the place of the one that it is compared
    with, itself or an earlier one. Raises UserError for unknown models or rows, and for models that do not
    share a tokenizer where a figure compares tokens.
    """
    origins = list(origins) if origins else [0] * len(names)
    labels = list(labels) if labels else labels_of(names)
    located = [locate(name) for name in names]
    ways = ask.ways(
        located, template=suite.template, max_tokens=suite.max_tokens, think_tokens=suite.think_tokens
    )
    questions = read_questions(suite)
    texts, lines = base_texts(suite)
    openings = measure.openings(lines, suite.opening_words)[:OPENINGS]
    words = read_texts(suite.last_words, None) if suite.last_words else []
    judge = open_model(suite.reward, engine, scores=True) if suite.reward else None
    kept: dict[int, Model] = {}  # models that later ones are compared with
    found: list[Measured] = []
    scores: list[tuple[np.ndarray, np.ndarray]] = []
    for place, (name, label, way) in enumerate(zip(names, labels, ways, strict=True)):
        say(f"measuring {label}")
        model, tokenizer, _ = open_model(name, engine)
        one = Measured(label, str(name), template=way.template, origin=origins[place], seed=suite.seed)
        _ask(one, model, tokenizer, questions, suite, way)
        _read(one, model, tokenizer, texts, openings, suite)
        if place == 0:
            vocabulary = tokenizer.get_vocab()
        elif tokenizer.get_vocab() != vocabulary:
            say(f"{label} has another tokenizer than {labels[0]}: figures per token are left out")
            one.values = {k: v for k, v in one.values.items() if k not in PER_TOKEN}
        elif origins[place] != place and "perplexity" in found[origins[place]].values:
            how: dict[str, Any] = {
                "window": suite.window,
                "stride": suite.stride,
                "by_window": len(texts) == 1,
            }
            kl = measure.base_text_kl(kept[origins[place]], model, tokenizer, texts, **how)
            one.values["kl"] = Values(kl.per_token, kl.tokens)
        if words:
            right, nll = measure.last_words(model, tokenizer, words)
            one.values |= {"last_word": Values(right), "last_word_perplexity": Values(nll)}
        if judge is not None:
            scores.append(_score(judge, questions, one.answers, ask.usual_template(located)))
        found.append(one)
        if place in origins[place + 1 :]:
            kept[place] = model
        kept = {p: m for p, m in kept.items() if p in origins[place + 1 :]}
        del model
        gc.collect()  # a model in a reference cycle would lie beside the next one
    if judge is not None:
        _rank(found, scores)
    for one in found:  # no row with a value: nothing to average
        one.values = {name: values for name, values in one.values.items() if np.isfinite(values.rows).any()}
    asked = [
        {
            "prompt": q.turns[-2].content,
            "wanted": q.turns[-1].content,
            "family": str(q.extra.get("family", "")),
            "rule": q.extra,
        }
        for q in questions
    ]
    return Comparison(suite.model_dump(mode="json"), suite.template, found, asked)


def read_questions(suite: SuiteSection) -> list[Conversation]:
    """The suite's questions, held out in content first, then, if asked for, in phrasing;
    ``extra["held_out"]`` says which.

    A row without an answer gets an empty one. Raises UserError as sources.load_rows and formats.parse_rows.
    """
    generated = suite.rows in sources.GENERATED
    splits = ["content"]
    if suite.phrasings and suite.rows == "embedded/tasks" and suite.split is None:
        splits.append("phrasing")
    found: list[Conversation] = []
    for held_out in splits:
        split = suite.split or ("phrasing" if held_out == "phrasing" else "valid" if generated else "train")
        rows = sources.load_rows(
            suite.rows, split=split, config=suite.config, limit=suite.limit, families=suite.families
        )
        parsed, dropped = formats.parse_rows(
            rows, format=suite.format, columns=suite.columns, source=suite.rows
        )
        for reason, count in dropped.items():
            say(f"{suite.rows} {split}: {count} rows dropped: {reason}")
        for row in parsed:
            if not isinstance(row, Conversation):
                raise UserError(
                    f"{suite.rows}: questions have one answer or none; these rows have two (set "
                    "suite.format=chosen)"
                )
            turns = row.turns if row.turns[-1].role == "assistant" else (*row.turns, Turn("assistant", ""))
            if len(turns) < 2:
                raise UserError(
                    f"{suite.rows}: these rows are plain text and ask nothing; read them with suite.texts"
                )
            extra = {**row.extra, "held_out": held_out}
            if turns[-1].content:
                extra.setdefault("answer", turns[-1].content)
            found.append(Conversation(turns, row.templated, extra))
    return found


def base_texts(suite: SuiteSection) -> tuple[list[str], list[str]]:
    """(texts whose loss is read, texts that are continued): the same, or with ``suite.join`` one text and its
    lines.
    """
    if suite.texts is None:
        return [], []
    lines = read_texts(
        suite.texts, suite.text_limit, split=suite.text_split, config=suite.text_config, empty=suite.join
    )
    return (["\n\n".join(lines)] if suite.join else lines), lines


def read_texts(
    source: str, limit: int | None, *, split: str = "train", config: str | None = None, empty: bool = False
) -> list[str]:
    """Base texts: the embedded ones, or the column ``text`` of a file or data set; rows without text only
    with ``empty``.

    Raises UserError for other rows, and where no row has any text.
    """
    if source == "embedded":
        return measure.base_text()[:limit]
    rows = sources.load_rows(source, split=split, config=config, limit=limit)
    if not rows or not any("text" in row for row in rows):
        raise UserError(
            f"{source}: base text is a file with a column 'text'; found "
            f"{', '.join(rows[0]) if rows else 'no row'}"
        )
    texts = [
        row["text"] for row in rows if isinstance(row.get("text"), str) and (empty or row["text"].strip())
    ]
    if len(texts) < len(rows):
        say(f"{source}: {len(rows) - len(texts)} rows without text are left out")
    if not any(text.strip() for text in texts):
        raise UserError(f"{source}: no row has any text")
    return texts


def labels_of(names: Sequence[str]) -> list[str]:
    """Short names that differ: the last part of each path, or the whole where two end alike."""
    short = [Path(name).name or str(name) for name in names]
    twice = {s for s, count in Counter(short).items() if count > 1}
    return [str(name) if s in twice else s for name, s in zip(names, short, strict=True)]


def _ask(
    one: Measured,
    model: Model,
    tokenizer: Any,
    questions: Sequence[Conversation],
    suite: SuiteSection,
    way: ask.Way,
) -> None:
    # A model that was trained with a system prompt is used with it, and is asked with it.
    questions = [ask.with_system(q, way.system) for q in questions]
    held_out = np.array([q.extra["held_out"] for q in questions])
    how: dict[str, Any] = {"template": way.template, "max_tokens": way.max_tokens}
    found = measure.answers(model, tokenizer, questions, **how)
    one.answers = [a.text for a in found]
    one.values["ended"] = Values(np.array([a.stopped for a in found], np.float64))
    one.values["length"] = Values(np.array([len(a.tokens) for a in found], np.float64))
    right = judged(questions, one.answers)
    for key, which in (("accuracy", "content"), ("accuracy_phrasing", "phrasing")):
        if np.isfinite(right[held_out == which]).any():
            one.values[key] = Values(right[held_out == which])
    unseen = [q for q in questions if q.extra["held_out"] == "content"]
    if suite.samples:
        sampled = measure.answers(
            model,
            tokenizer,
            unseen,
            samples=suite.samples,
            temperature=suite.temperature,
            top_p=suite.top_p,
            seed=suite.seed,
            **how,
        )
        each = {
            "accuracy_sampled": judged(
                [q for q in unseen for _ in range(suite.samples)], [a.text for a in sampled]
            ),
            "ended_sampled": np.array([a.stopped for a in sampled], np.float64),
            "length_sampled": np.array([len(a.tokens) for a in sampled], np.float64),
        }
        one.values |= {
            name: Values(values.reshape(len(unseen), suite.samples).mean(1)) for name, values in each.items()
        }
    answered = [q for q in unseen if q.turns[-1].content]
    if answered:
        examples = [
            encode.encode(q, tokenizer, template=way.template, max_length=model.context or 2048)
            for q in answered
        ]
        fitting = [i for i, e in enumerate(examples) if e is not None]
        loss = measure.response_loss(model, [e for e in examples if e is not None])
        # A row that another model's prompt leaves room for keeps its place: differences are drawn row by row.
        rows, tokens = np.full(len(answered), np.nan), np.zeros(len(answered), np.int64)
        rows[fitting], tokens[fitting] = loss.per_token, loss.tokens
        one.values["response_loss"] = Values(rows, tokens)


def judged(questions: Sequence[Conversation], answers: Sequence[str]) -> np.ndarray:
    """1 for each answer that its row's rule accepts, 0 for each other, nan for a row without a rule: [R]
    float64.
    """
    return _verdicts([q.extra for q in questions], answers)


def judged_texts(comparison: Comparison) -> dict[str, np.ndarray]:
    """The same for each model's greedy answers, by its name: [questions] float64."""
    rules = [q["rule"] for q in comparison.questions]
    return {m.name: _verdicts(rules, m.answers) for m in comparison.models}


def _verdicts(rules: Sequence[dict[str, Any]], answers: Sequence[str]) -> np.ndarray:
    verdicts = [verify.verify(rule, text) for rule, text in zip(rules, answers, strict=True)]
    return np.array([np.nan if v is None else float(v) for v in verdicts])


def text_loss(model: Model, tokenizer: Any, texts: Sequence[str], suite: SuiteSection) -> measure.RowLoss:
    """Loss of base texts as the suite reads them, of each text, or where there is one, of each of its
    windows.
    """
    return measure.base_text_loss(
        model, tokenizer, texts, window=suite.window, stride=suite.stride, by_window=len(texts) == 1
    )


def _read(
    one: Measured,
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    openings: Sequence[str],
    suite: SuiteSection,
) -> None:
    if texts:
        loss = text_loss(model, tokenizer, texts, suite)
        one.values["perplexity"] = Values(loss.per_token, loss.tokens)
    if not openings:
        return
    one.continuations = measure.continuations(model, tokenizer, openings, max_tokens=suite.continuation)
    one.values |= _repetition(one.continuations, len(openings), "")
    if suite.samples:
        sampled = measure.continuations(
            model,
            tokenizer,
            openings,
            max_tokens=suite.continuation,
            temperature=suite.temperature,
            top_p=suite.top_p,
            samples=suite.samples,
            seed=suite.seed,
        )
        one.values |= _repetition(sampled, len(openings), "_sampled")


def _repetition(continuations: Sequence[Sequence[int]], texts: int, how: str) -> dict[str, Values]:
    """Measures of repetition by their names with ``how`` behind; a text's value is the mean over its
    continuations, or its part in all.
    """
    each = len(continuations) // texts
    of_text = [continuations[begin : begin + each] for begin in range(0, len(continuations), each)]
    return {
        f"seq_rep_4{how}": Values(
            np.array([np.mean([seq_rep_n(tokens) for tokens in text]) for text in of_text])
        ),
        f"distinct_2{how}": Values(distinct_by_text(of_text)),
        f"diversity{how}": Values(
            np.array([np.mean([diversity(tokens) for tokens in text]) for text in of_text])
        ),
    }


def _score(
    judge: tuple[Model, Any, Source], questions: Sequence[Conversation], answers: Sequence[str], template: str
) -> tuple[np.ndarray, np.ndarray]:
    """The reward model's scores of the answers and how many of its tokens it read of each, [R] each.

    A thought is not read: the judge was made of answers. What leaves nothing to read scores -inf, and nan
    what does not fit the judge's context.
    """
    from mlx_posttrain.data.pairs import encode_answers
    from mlx_posttrain.rewards.scorer import score_rows

    model, tokenizer, source = judge
    said = [verify.after_thought(answer) for answer in answers]
    rows = encode_answers(
        [q.turns[:-1] for q in questions], said, tokenizer, source.template or template, model.context
    )
    scores = np.array([np.nan if text.strip() else -np.inf for text in said])
    known = [i for i, row in enumerate(rows) if row is not None]
    scores[known] = score_rows(
        model, [row for row in rows if row is not None], pad_id(model.config, tokenizer)
    )
    return scores, np.array(
        [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in said],
        np.float64,
    )


def _rank(found: Sequence[Measured], scores: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Fill in scores and wins from each model's scores and lengths; says of how many answers there was
    nothing to read.

    Leaving such answers out would reward a model for saying nothing: they lose, and have the lowest score
    that any answer of any model got.
    """
    lowest = min(
        (float(own[np.isfinite(own)].min()) for own, _ in scores if np.isfinite(own).any()), default=np.nan
    )
    for place, (one, (own, lengths)) in enumerate(zip(found, scores, strict=True)):
        empty = np.isneginf(own)
        if empty.any():
            say(
                f"{one.name}: {empty.sum()} of {len(own)} answers are empty; they count as lost, and with "
                "the lowest score of all answers"
            )
        one.values["score"] = Values(np.where(empty, lowest, own))
        if one.origin != place:
            theirs, other_lengths = scores[one.origin]
            won = length_controlled_wins(own, theirs, lengths, other_lengths)
            one.values["wins"] = Values(won)
            if np.isnan(won).all() and np.isfinite(own).any():
                gap = lengths.mean() - other_lengths.mean()
                say(
                    f"{one.name}: no win rate against {found[one.origin].name}: lengths are too far apart "
                    f"to compare at one ({gap:+.1f} tokens)"
                )
