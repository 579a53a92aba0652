"""Comparison of models on one suite of questions, texts and settings.

Every model gets the same rows and the same decoding, each prompted as it was trained (prompting.py). The
result is a comparison.Comparison.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mlx_posttrain import config
from mlx_posttrain.console import lines_once, log
from mlx_posttrain.data import encode, formats, sources
from mlx_posttrain.data.read import with_system
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import best_of, completions, continuations, likelihood, metrics, own_rows
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.evaluation.metric_table import PASS_AT, PER_TOKEN
from mlx_posttrain.evaluation.prompting import (
    OWN_TEMPLATE,
    PromptSettings,
    most_common_template,
    prompt_settings,
)
from mlx_posttrain.evaluation.reward_scoring import add_reward_metrics, score_answers
from mlx_posttrain.evaluation.right_answers import add_accuracy, check_answers
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import locate, saves_language_model


class SuiteSection(config.Section):
    """What models are compared on; ``compare`` and ``eval`` take every key on the command line too."""

    rows: str | None = Field(
        None,
        description="questions: embedded data, a file, or a hub id; answers are checked by the rows' rules; "
        "null: the held-out rows of the first run, and embedded/tasks where it was trained on embedded data",
    )
    split: str | None = Field(
        None, description="split of the questions; null: the held-out one of embedded data, else `train`"
    )
    config: str | None = Field(None, description="configuration name of a Hugging Face data set of questions")
    format: str = Field("auto", description="format of the questions' rows, as data.format")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column name: the file's column name; empty: those of the first run, where they fit",
    )
    families: list[str] | None = Field(None, description="kinds of embedded questions to take; null: all")
    limit: int = Field(160, ge=1, description="number of questions, and with `phrasings` as many again")
    skip: int = Field(0, ge=0, description="questions left out first, which another report has asked")
    phrasings: bool = Field(
        True, description="with embedded/tasks: also ask known contents in held-out phrasings"
    )
    template: str = Field(
        OWN_TEMPLATE,
        description="one for all models, or own: each run's own, and for other models that of most runs",
    )
    max_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    think_tokens: int | None = Field(
        None,
        ge=1,
        description="longest thought and answer of a distilled run; null: its longest training row",
    )
    samples: int = Field(
        4, ge=0, description="sampled answers and continuations in addition to each greedy one; 0: none"
    )
    temperature: float = Field(0.7, gt=0, description="temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling (top-p)")
    texts: str | None = Field(
        "embedded", description="base text: `embedded`, or a file with a column text; null: none"
    )
    text_config: str | None = Field(
        None, description="configuration name of a Hugging Face data set of base texts"
    )
    text_split: str = Field("train", description="split of that data set, or of a folder's files")
    text_limit: int | None = Field(100, ge=1, description="read at most this many base texts; null: all")
    join: bool = Field(
        False,
        description="read the base texts as one, with blank lines between: WikiText's on the hub are lines",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="tokens of base text that a model reads at a time; null: its context, at most 512",
    )
    stride: int | None = Field(None, ge=1, description="tokens from one window to the next; null: the window")
    last_words: str | None = Field(
        None, description="a file with a column text whose last word is to be predicted (LAMBADA); null: none"
    )
    last_word_limit: int | None = Field(
        1000, ge=1, description="read at most this many of those texts; null: all"
    )
    opening_words: int = Field(
        12,
        ge=1,
        description="words of each base text (of the first 200) that are continued to measure repetition and "
        "coherence",
    )
    continuation: int = Field(64, ge=8, description="tokens of each continuation")
    judge: str | None = Field(
        None,
        description="the model whose perplexity of continuations is their coherence; null: the one that the "
        "first model started from",
    )
    reward: str | None = Field(
        None, description="a reward-model run or sequence classifier that scores the answers; null: none"
    )
    seed: int = Field(
        0,
        ge=0,
        description="fixes sampling, intervals, tests and analyses; greedy text does not depend on it",
    )


MAX_OPENINGS = 200  # base texts that are continued at most


@lines_once()
def compare(
    names: Sequence[str],
    suite: SuiteSection,
    engine: str = "auto",
    labels: Sequence[str] | None = None,
    baselines: Sequence[int] | None = None,
    dtype: str | None = None,
    chosen: Mapping[str, best_of.BestOf] | None = None,
) -> Comparison:
    """Measure every model on the suite.

    names: anything that ``models.source.locate`` knows. Differences, the KL and wins are against the first
    model or, with ``baselines``, against the one at the place given for each model: itself or an earlier one.
    dtype: of every model; None: its own. chosen: answers of the first model, the best of several by a reward
    model, which come after the models. Raises UserError for unknown models or rows, and where models that do
    not share a tokenizer would be compared token by token.
    """
    baselines = list(baselines) if baselines else [0] * len(names)
    labels = list(labels) if labels else model_labels(names)
    sources_of_models = [locate(name) for name in names]
    for name, source in zip(names, sources_of_models, strict=True):  # before any of them is measured
        if not saves_language_model(source.adapter or source.folder):
            raise UserError(
                f"{name} is a reward model: it scores texts and writes none; give a language model, or name "
                "it as the judge with reward="
            )
    settings = prompt_settings(
        sources_of_models,
        template=suite.template,
        max_tokens=suite.max_tokens,
        think_tokens=suite.think_tokens,
    )
    named = suite.rows is not None or suite.families is not None  # families are those of embedded questions
    asked = None if named else own_rows.read(labels, sources_of_models, suite.limit, suite.skip)
    if asked is None:
        suite = own_rows.with_rows(suite, sources_of_models)
        questions, where = read_questions(suite), f"from {suite.rows}"
    else:
        questions, where = [own_rows.with_extras(row) for row in asked.questions], asked.where
    texts, lines = read_base_texts(suite)
    if asked is not None and asked.texts and suite.texts == "embedded":
        texts = lines = asked.texts
    split = completions.split_texts(lines, suite.opening_words)[:MAX_OPENINGS]
    openings, human = [opening for opening, _ in split], [rest for _, rest in split]
    coherence = None
    if openings:
        judge = suite.judge or continuations.default_judge(str(names[0]))
        coherence = continuations.read_human_text(judge, engine, openings, human, suite.continuation)
    last_word_texts = read_texts(suite.last_words, suite.last_word_limit) if suite.last_words else []
    reward_model = open_model(suite.reward, engine, scores=True) if suite.reward else None
    kept: dict[int, Model] = {}  # models that later ones are compared with
    results: list[ModelResult] = []
    scores: list[tuple[np.ndarray, np.ndarray]] = []
    best_results: list[ModelResult] = []
    written: list[dict[str, list[str]]] = []  # continuations by metric of coherence
    for place, (name, label, prompting) in enumerate(zip(names, labels, settings, strict=True)):
        log(f"measuring {label}")
        model, tokenizer, _ = open_model(name, engine, dtype)
        baseline = baselines[place]
        result = ModelResult(
            label, str(name), template=prompting.template, baseline_index=baseline, seed=suite.seed
        )
        _measure_answers(result, model, tokenizer, questions, suite, prompting)
        if place == 0:
            for own, best in (chosen or {}).items():
                found = best_of.measure(own, best, str(name), model, tokenizer, questions, prompting, engine)
                best_results += found
        if texts:
            loss = text_loss(model, tokenizer, texts, suite)
            result.values["perplexity"] = Values(loss.per_token, loss.tokens)
        if openings:
            written.append(
                continuations.measure_continuations(
                    result,
                    model,
                    tokenizer,
                    openings,
                    max_tokens=suite.continuation,
                    samples=suite.samples,
                    temperature=suite.temperature,
                    top_p=suite.top_p,
                    seed=suite.seed,
                )
            )
        if place == 0:
            vocabulary = tokenizer.get_vocab()
        elif tokenizer.get_vocab() != vocabulary:
            log(f"{label} has another tokenizer than {labels[0]}: metrics per token are left out")
            result.values = {k: v for k, v in result.values.items() if k not in PER_TOKEN}
        elif baseline != place and "perplexity" in results[baseline].values:
            kl = likelihood.base_text_kl(
                kept[baseline],
                model,
                tokenizer,
                texts,
                window=suite.window,
                stride=suite.stride,
                by_window=len(texts) == 1,
            )
            result.values["kl"] = Values(kl.per_token, kl.tokens)
        if last_word_texts:
            correct, nll = likelihood.last_words(model, tokenizer, last_word_texts)
            result.values |= {"last_word": Values(correct), "last_word_perplexity": Values(nll)}
        if reward_model is not None:
            template = most_common_template(sources_of_models)
            scores.append(score_answers(reward_model, questions, result.answers, template))
        results.append(result)
        if place in baselines[place + 1 :]:
            kept[place] = model
        kept = {p: m for p, m in kept.items() if p in baselines[place + 1 :]}
        del model
        gc.collect()  # a model in a reference cycle would take memory next to the following one
    for result in best_results:
        add_accuracy(result, questions)
        if reward_model is not None:
            template = most_common_template(sources_of_models)
            scores.append(score_answers(reward_model, questions, result.answers, template))
    if coherence is not None:
        continuations.measure_coherence(results, written, openings, coherence, engine)
    results += best_results
    if reward_model is not None:
        add_reward_metrics(results, scores)
    for result in results:  # a metric without a value in any row has no mean
        result.values = {k: v for k, v in result.values.items() if np.isfinite(v.rows).any()}
    rows = [
        {
            "prompt": q.turns[-2].content,
            "expected": q.turns[-1].content,
            "family": str(q.extra.get("family", "")),
            "rule": q.extra,
        }
        for q in questions
    ]
    return Comparison(suite.model_dump(mode="json"), suite.template, results, rows, coherence, where)


def read_questions(suite: SuiteSection) -> list[Conversation]:
    """The suite's questions: first those with held-out contents, then with held-out phrasings if wanted.

    ``extra["held_out"]`` is "content" or "phrasing". A row without an answer gets an empty one. Raises
    UserError as sources.load_rows and formats.parse_rows, and for rows that are no questions.
    """
    source = suite.rows or own_rows.EMBEDDED
    generated = source in sources.GENERATED
    splits = ["content"]
    if suite.phrasings and source == own_rows.EMBEDDED and suite.split is None:
        splits.append("phrasing")
    questions: list[Conversation] = []
    for held_out in splits:
        split = suite.split or ("phrasing" if held_out == "phrasing" else "valid" if generated else "train")
        rows = sources.load_rows(
            source,
            split=split,
            config=suite.config,
            limit=suite.skip + suite.limit,
            families=suite.families,
            split_key="split",
            limit_key="limit",
        )[suite.skip :]
        if not rows:
            raise UserError(f"{source} {split}: skip={suite.skip:,} leaves no question")
        parsed, dropped = formats.parse_rows(
            rows, format=suite.format, columns=suite.columns, source=source, setting="columns"
        )
        for reason, count in dropped.items():
            log(f"{source} {split}: {count} rows dropped: {reason}")
        for row in parsed:
            if not isinstance(row, Conversation):
                raise UserError(
                    f"{source}: questions have one answer or none, but these rows have two (set "
                    "suite.format=chosen)"
                )
            turns = row.turns if row.turns[-1].role == "assistant" else (*row.turns, Turn("assistant", ""))
            if len(turns) < 2:
                raise UserError(f"{source}: these rows are plain text; read them with suite.texts")
            questions.append(own_rows.with_extras(Conversation(turns, row.templated, row.extra), held_out))
    return questions


def read_base_texts(suite: SuiteSection) -> tuple[list[str], list[str]]:
    """(texts whose loss is measured, texts that are continued).

    They are the same or, with ``suite.join``, one text and its lines.
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
    """Base texts: the embedded ones, or the column ``text`` of a file or data set.

    empty: also return rows whose text is blank. Raises UserError where there is no such column, and where no
    row has any text.
    """
    if source == "embedded":
        return likelihood.embedded_texts()[:limit]
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
        log(f"{source}: {len(rows) - len(texts)} rows without text are left out")
    if not any(text.strip() for text in texts):
        raise UserError(f"{source}: no row has any text")
    return texts


def model_labels(names: Sequence[str]) -> list[str]:
    """Short names that differ: the last part of each path, or the full path where two end alike."""
    short = [Path(name).name or str(name) for name in names]
    repeated = {s for s, count in Counter(short).items() if count > 1}
    return [str(name) if s in repeated else s for name, s in zip(names, short, strict=True)]


def _measure_answers(
    result: ModelResult,
    model: Model,
    tokenizer: Any,
    questions: Sequence[Conversation],
    suite: SuiteSection,
    prompting: PromptSettings,
) -> None:
    """Fill in a model's greedy answers and the metrics of its answers."""
    if not questions:
        return
    # a model that was trained with a system prompt is prompted with it
    questions = [with_system(q, prompting.system) for q in questions]
    options: dict[str, Any] = {"template": prompting.template, "max_tokens": prompting.max_tokens}
    greedy = completions.generate_answers(model, tokenizer, questions, **options)
    result.answers = [a.text for a in greedy]
    result.values["ended"] = Values(np.array([a.stopped for a in greedy], np.float64))
    result.values["length"] = Values(np.array([len(a.tokens) for a in greedy], np.float64))
    add_accuracy(result, questions)
    unseen = [q for q in questions if q.extra["held_out"] == "content"]
    if suite.samples:
        sampled = completions.generate_answers(
            model,
            tokenizer,
            unseen,
            samples=suite.samples,
            temperature=suite.temperature,
            top_p=suite.top_p,
            seed=suite.seed,
            **options,
        )
        by_sample = {
            "accuracy_sampled": check_answers(
                [q for q in unseen for _ in range(suite.samples)], [a.text for a in sampled]
            ),
            "ended_sampled": np.array([a.stopped for a in sampled], np.float64),
            "length_sampled": np.array([len(a.tokens) for a in sampled], np.float64),
        }
        result.values |= {
            name: Values(values.reshape(len(unseen), suite.samples).mean(1))
            for name, values in by_sample.items()
        }
        right = by_sample["accuracy_sampled"].reshape(len(unseen), suite.samples)
        result.values |= {
            f"pass_at_{k}": Values(metrics.pass_at_k(right, k)) for k in PASS_AT if k <= suite.samples
        }
    answered = [q for q in unseen if q.turns[-1].content]
    if answered:
        examples = [
            encode.encode(q, tokenizer, template=prompting.template, max_length=model.context or 2048)
            for q in answered
        ]
        fitting = [i for i, e in enumerate(examples) if e is not None]
        loss = likelihood.response_loss(model, [e for e in examples if e is not None])
        # Rows that do not fit stay in place as nan, because models are compared row by row and the prompt of
        # another model may leave room for them.
        rows, tokens = np.full(len(answered), np.nan), np.zeros(len(answered), np.int64)
        rows[fitting], tokens[fitting] = loss.per_token, loss.tokens
        result.values["response_loss"] = Values(rows, tokens)


def text_loss(model: Model, tokenizer: Any, texts: Sequence[str], suite: SuiteSection) -> likelihood.RowLoss:
    """Loss of each base text in the suite's windows, or of each window where there is a single text."""
    return likelihood.base_text_loss(
        model, tokenizer, texts, window=suite.window, stride=suite.stride, by_window=len(texts) == 1
    )
