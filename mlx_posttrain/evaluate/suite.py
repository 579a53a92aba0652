"""One set of questions, texts and settings for every model, and a table of what each of them did: the comparison of stages.

Every model meets the same rows, the same template and the same decoding. Every figure is a mean of values per row, which stay, so that a
difference between two models is drawn over the same rows (metrics.paired_bootstrap). What a figure's ceiling is, and which way is better,
stands beside it in ``METRICS``.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mlx_posttrain import loading
from mlx_posttrain import recipe as recipes
from mlx_posttrain.data import encode, formats, sources
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import measure, verify
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, distinct_n, diversity, paired_bootstrap, seq_rep_n
from mlx_posttrain.evaluate.preference import length_controlled_wins
from mlx_posttrain.progress import say


class SuiteSection(recipes.Section):
    """What models are compared on. Every key may be set on the command line of ``compare`` and ``eval`` as well."""

    rows: str = Field("embedded/tasks", description="questions: embedded data, a file, or a hub id; answers are checked by the rows' rules")
    split: str | None = Field(None, description="split of the questions; null: the held-out one of embedded data, else `train`")
    config: str | None = Field(None, description="configuration name of a Hugging Face data set of questions")
    format: str = Field("auto", description="shape of a question's row, as data.format")
    columns: dict[str, str] = Field(default_factory=dict, description="our column name: the file's column name")
    families: list[str] | None = Field(None, description="kinds of embedded questions to take; null: all")
    limit: int = Field(160, ge=1, description="ask this many questions, and with `phrasings` as many again")
    phrasings: bool = Field(True, description="with embedded/tasks: ask known contents in unseen words as well")
    template: str | None = Field(None, description="how every model is asked; null: as most of the runs were trained")
    max_tokens: int = Field(64, ge=1, description="longest answer in tokens")
    samples: int = Field(0, ge=0, description="sampled answers to each question beside the greedy one; 0: none")
    temperature: float = Field(0.7, gt=0, description="temperature of the sampled answers")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of the sampled answers")
    texts: str | None = Field("embedded", description="base text: `embedded`, or a file with a column text; null: none")
    text_limit: int = Field(100, ge=1, description="read at most this many base texts")
    window: int | None = Field(None, ge=1, description="tokens a model reads base text in at a time; null: its context, at most 512")
    stride: int | None = Field(None, ge=1, description="tokens from one window to the next; null: the window")
    last_words: str | None = Field(None, description="a file with a column text whose last word is to be guessed (LAMBADA); null: none")
    opening_words: int = Field(12, ge=1, description="words of each base text that are continued, to see whether a model repeats itself")
    continuation: int = Field(64, ge=8, description="tokens of each continuation")
    reward: str | None = Field(None, description="a reward-model run or sequence classifier that scores the answers; null: none")
    seed: int = Field(0, ge=0, description="fixes samples and intervals")


MIN_ROWS = 20  # below this many rows a percentile interval is too narrow to call a difference beyond chance

#: Figures per token, which mean nothing across tokenizers.
PER_TOKEN = ("response_loss", "perplexity", "kl", "seq_rep_4", "seq_rep_4_sampled", "distinct_2", "diversity", "length")


class Metric(NamedTuple):
    """A figure: how it is written, which way is better, and what is the best that can be had."""

    label: str
    form: str
    better: Literal["higher", "lower", "neither"]
    ceiling: str
    about: str
    of: Callable[[float], float] | None = None  # monotone, laid on mean and bounds: exp makes a loss a perplexity


METRICS: dict[str, Metric] = {
    "accuracy": Metric("right answers", "{:.1%}", "higher", "100 %", "greedy answers that the row's rule accepts; contents no run was trained on"),
    "accuracy_phrasing": Metric("right, unseen phrasing", "{:.1%}", "higher", "100 %", "the same for known contents in words no run was trained on"),
    "accuracy_sampled": Metric("right answers, sampled", "{:.1%}", "higher", "100 %", "mean over several sampled answers to each question"),
    "response_loss": Metric("response loss", "{:.3f}", "lower", "0", "nats per token of the wanted answers"),
    "perplexity": Metric("base-text perplexity", "{:.1f}", "lower", "1", "of plain text, in windows, each token scored once", math.exp),
    "kl": Metric("KL from the base", "{:.3f}", "neither", "0: unchanged", "KL(base || model) on plain text, nats per token"),
    "last_word": Metric("last word", "{:.1%}", "higher", "100 %", "texts whose last word greedy decoding finds"),
    "last_word_perplexity": Metric("last-word perplexity", "{:.1f}", "lower", "1", "exp of the last word's mean cost", math.exp),
    "seq_rep_4": Metric("repetition", "{:.3f}", "lower", "0", "seq-rep-4 of greedy continuations: share of 4-grams that came before"),
    "distinct_2": Metric("distinct-2", "{:.3f}", "higher", "1", "share of different 2-grams in a greedy continuation"),
    "diversity": Metric("diversity", "{:.3f}", "higher", "1", "product of 1 - seq-rep-n, n = 2..4, of greedy continuations"),
    "seq_rep_4_sampled": Metric("repetition, sampled", "{:.3f}", "lower", "0", "the same of sampled continuations"),
    "ended": Metric("ended by itself", "{:.0%}", "neither", "100 %", "greedy answers that ended before the limit"),
    "length": Metric("answer tokens", "{:.1f}", "neither", "the limit", "tokens of the greedy answers"),
    "score": Metric("reward score", "{:+.2f}", "higher", "none", "the reward model's score of the greedy answers"),
    "wins": Metric("wins, length-controlled", "{:.1%}", "higher", "100 %; baseline 50 %",
                   "share of answers that the reward model prefers to the baseline's, were both of one length"),
}  # fmt: skip


class Values(NamedTuple):
    """One model's values of a metric, [R] each; the figure is their weighted mean."""

    rows: np.ndarray
    weights: np.ndarray | None = None


@dataclass
class Measured:
    """What one model did."""

    name: str
    path: str
    values: dict[str, Values] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)  # greedy, one per question
    continuations: list[list[int]] = field(default_factory=list)  # greedy, one per base text, to their end of text

    def figure(self, metric: str) -> Interval:
        """Mean and 95 % bootstrap interval."""
        rows, weights = self.values[metric]
        return bootstrap(rows, weights=weights, of=METRICS[metric].of)


@dataclass
class Comparison:
    """Several models on one suite; the first is the baseline."""

    suite: dict[str, Any]
    template: str
    models: list[Measured]
    questions: list[dict[str, Any]]  # prompt, wanted, family, and the row that the answer's rule reads

    def metrics(self) -> list[str]:
        """Names of what was measured, in the order of ``METRICS``."""
        return [name for name in METRICS if any(name in m.values for m in self.models)]

    def difference(self, metric: str, model: Measured) -> Interval | None:
        """``model`` minus the baseline over the same rows, in the unit of the rows (nats where the figure is a perplexity)."""
        base = self.models[0]
        if model is base or metric not in model.values or metric not in base.values:
            return None
        rows, theirs = model.values[metric].rows, base.values[metric].rows
        if not np.isfinite(rows - theirs).any():
            return None
        return paired_bootstrap(rows, theirs, weights=base.values[metric].weights)

    def sure(self, metric: str, model: Measured) -> bool:
        """Whether the difference to the baseline is beyond chance: 0 lies outside its 95 % interval, over at least MIN_ROWS rows."""
        d = self.difference(metric, model)
        if d is None:
            return False
        both = np.isfinite(model.values[metric].rows - self.models[0].values[metric].rows).sum()
        return bool(both >= MIN_ROWS and (d.low > 0 or d.high < 0))

    def to_dict(self) -> dict[str, Any]:
        """All figures with intervals and differences, for comparison.json."""
        return {
            "suite": self.suite,
            "template": self.template,
            "baseline": self.models[0].name,
            "metrics": {name: {"label": METRICS[name].label, "better": METRICS[name].better, "ceiling": METRICS[name].ceiling,
                               "about": METRICS[name].about} for name in self.metrics()},
            "models": [
                {
                    "name": m.name, "path": m.path,
                    "figures": {name: m.figure(name)._asdict() for name in m.values},
                    "minus_baseline": {name: d._asdict() for name in m.values if (d := self.difference(name, m)) is not None},
                }
                for m in self.models
            ],
        }  # fmt: skip

    def cell(self, metric: str, model: Measured) -> str:
        """A figure with its interval as text; '-' where it was not measured."""
        if metric not in model.values:
            return "-"
        form, value = METRICS[metric].form, model.figure(metric)
        return f"{form.format(value.mean)} [{form.format(value.low)}, {form.format(value.high)}]"

    def sentence(self, metric: str, model: Measured) -> str | None:
        """In words, what the difference to the baseline says; None for the baseline itself."""
        d = self.difference(metric, model)
        if d is None:
            return None
        unit = "nats" if METRICS[metric].of else ""
        form = "{:+.3f}" if METRICS[metric].of else METRICS[metric].form.replace("{:", "{:+").replace("++", "+")
        sure = "" if self.sure(metric, model) else ": no difference that these rows can show"
        return f"{form.format(d.mean)} [{form.format(d.low)}, {form.format(d.high)}] {unit}".strip() + sure


def compare(names: Sequence[str], suite: SuiteSection, engine: str = "auto", labels: Sequence[str] | None = None) -> Comparison:
    """Measure every model on the suite; the first is the baseline of differences, of the KL and of wins.

    names: whatever ``loading.locate`` knows. Raises UserError for unknown models or rows, and for models that do not share a tokenizer
    where a figure compares tokens.
    """
    labels = list(labels) if labels else labels_of(names)
    located = [loading.locate(name) for name in names]
    template = suite.template or _usual_template(located)
    questions = read_questions(suite)
    texts = read_texts(suite.texts, suite.text_limit) if suite.texts else []
    words = read_texts(suite.last_words, None) if suite.last_words else []
    judge = loading.open_model(suite.reward, engine, scores=True) if suite.reward else None
    base: Model | None = None
    found: list[Measured] = []
    scores: list[np.ndarray] = []
    for name, label in zip(names, labels, strict=True):
        say(f"measuring {label}")
        model, tokenizer, source = loading.open_model(name, engine)
        one = Measured(label, str(name))
        # A model that was trained with a system prompt is used with it, and is asked with it.
        _ask(one, model, tokenizer, [_with_system(q, source.system) for q in questions], suite, template)
        _read(one, model, tokenizer, texts, suite)
        if base is None:
            base, vocabulary = model, tokenizer.get_vocab()
        elif tokenizer.get_vocab() != vocabulary:
            say(f"{label} has another tokenizer than {labels[0]}: figures per token are left out")
            one.values = {k: v for k, v in one.values.items() if k not in PER_TOKEN}
        elif texts:
            kl = measure.base_text_kl(base, model, tokenizer, texts, window=suite.window, stride=suite.stride)
            one.values["kl"] = Values(kl.per_token, kl.tokens)
        if words:
            right, nll = measure.last_words(model, tokenizer, words)
            one.values |= {"last_word": Values(right), "last_word_perplexity": Values(nll)}
        if judge is not None:
            scores.append(_score(judge, questions, one.answers, template))
            one.values["score"] = Values(scores[-1])
            if found and "length" in one.values:
                own, theirs = one.values["length"].rows, found[0].values["length"].rows
                one.values["wins"] = Values(length_controlled_wins(scores[-1], scores[0], own, theirs))
        one.values = {k: v for k, v in one.values.items() if np.isfinite(v.rows).any()}  # every answer empty: no score has a mean
        found.append(one)
        if model is not base:
            del model
        gc.collect()  # a model in a reference cycle would lie beside the next one
    asked = [
        {"prompt": q.turns[-2].content, "wanted": q.turns[-1].content, "family": str(q.extra.get("family", "")), "rule": q.extra}
        for q in questions
    ]
    return Comparison(suite.model_dump(mode="json"), template, found, asked)


def _with_system(question: Conversation, system: str | None) -> Conversation:
    if system is None or not question.templated or question.turns[0].role == "system":
        return question
    return replace(question, turns=(Turn("system", system), *question.turns))


def read_questions(suite: SuiteSection) -> list[Conversation]:
    """The suite's questions, held out in content first, then, if asked for, in phrasing; ``extra["held_out"]`` says which.

    A row without an answer gets an empty one. Raises UserError as sources.load_rows and formats.parse_rows.
    """
    generated = suite.rows in sources.GENERATED
    splits = ["content"]
    if suite.phrasings and suite.rows == "embedded/tasks" and suite.split is None:
        splits.append("phrasing")
    found: list[Conversation] = []
    for held_out in splits:
        split = suite.split or ("phrasing" if held_out == "phrasing" else "valid" if generated else "train")
        rows = sources.load_rows(suite.rows, split=split, config=suite.config, limit=suite.limit, families=suite.families)
        parsed, dropped = formats.parse_rows(rows, format=suite.format, columns=suite.columns, source=suite.rows)
        for reason, count in dropped.items():
            say(f"{suite.rows} {split}: {count} rows dropped: {reason}")
        for row in parsed:
            if not isinstance(row, Conversation):
                raise UserError(f"{suite.rows}: questions have one answer or none; these rows have two (set suite.format=chosen)")
            turns = row.turns if row.turns[-1].role == "assistant" else (*row.turns, Turn("assistant", ""))
            if len(turns) < 2:
                raise UserError(f"{suite.rows}: these rows are plain text and ask nothing; read them with suite.texts")
            extra = {**row.extra, "held_out": held_out}
            if turns[-1].content:
                extra.setdefault("answer", turns[-1].content)
            found.append(Conversation(turns, row.templated, extra))
    return found


def read_texts(source: str, limit: int | None) -> list[str]:
    """Base texts: the embedded ones, or the column ``text`` of a file or data set. Raises UserError for other rows."""
    if source == "embedded":
        return measure.base_text()[:limit]
    rows = sources.load_rows(source, limit=limit)
    if not rows or not any("text" in row for row in rows):
        raise UserError(f"{source}: base text is a file with a column 'text'; found {', '.join(rows[0]) if rows else 'no row'}")
    texts = [row["text"] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
    if len(texts) < len(rows):
        say(f"{source}: {len(rows) - len(texts)} rows without text are left out")
    if not texts:
        raise UserError(f"{source}: no row has any text")
    return texts


def labels_of(names: Sequence[str]) -> list[str]:
    """Short names that differ: the last part of each path, or the whole where two end alike."""
    short = [Path(name).name or str(name) for name in names]
    twice = {s for s, count in Counter(short).items() if count > 1}
    return [str(name) if s in twice else s for name, s in zip(names, short, strict=True)]


def _usual_template(located: Sequence[loading.Source]) -> str:
    """The template that most of the runs were trained with; the first of them where there is a tie."""
    known = [s.template for s in located if s.template and s.template != "none"]
    if not known:
        return "instruction"
    template = Counter(known).most_common(1)[0][0]
    others = sorted(set(known) - {template})
    if others:
        say(f"all models are asked in the template {template!r}; some runs were trained with {', '.join(others)} (suite.template chooses)")
    return template


def _ask(one: Measured, model: Model, tokenizer: Any, questions: Sequence[Conversation], suite: SuiteSection, template: str) -> None:
    held_out = np.array([q.extra["held_out"] for q in questions])
    found = measure.answers(model, tokenizer, questions, template=template, max_tokens=suite.max_tokens)
    one.answers = [a.text for a in found]
    one.values["ended"] = Values(np.array([a.stopped for a in found], np.float64))
    one.values["length"] = Values(np.array([len(a.tokens) for a in found], np.float64))
    right = judged(questions, one.answers)
    for key, which in (("accuracy", "content"), ("accuracy_phrasing", "phrasing")):
        if np.isfinite(right[held_out == which]).any():
            one.values[key] = Values(right[held_out == which])
    unseen = [q for q in questions if q.extra["held_out"] == "content"]
    if suite.samples and "accuracy" in one.values:
        sampled = measure.answers(
            model, tokenizer, unseen, template=template, max_tokens=suite.max_tokens, samples=suite.samples,
            temperature=suite.temperature, top_p=suite.top_p, seed=suite.seed,
        )  # fmt: skip
        each = judged([q for q in unseen for _ in range(suite.samples)], [a.text for a in sampled])
        one.values["accuracy_sampled"] = Values(each.reshape(len(unseen), suite.samples).mean(1))
    answered = [q for q in unseen if q.turns[-1].content]
    if answered:
        length = model.context or 2048
        examples = [encode.encode(q, tokenizer, template=template, max_length=length) for q in answered]
        loss = measure.response_loss(model, [e for e in examples if e is not None])
        one.values["response_loss"] = Values(loss.per_token, loss.tokens)


def judged(questions: Sequence[Conversation], answers: Sequence[str]) -> np.ndarray:
    """1 for each answer that its row's rule accepts, 0 for each other, nan for a row without a rule: [R] float64."""
    return _verdicts([q.extra for q in questions], answers)


def judged_texts(comparison: Comparison) -> dict[str, np.ndarray]:
    """The same for each model's greedy answers, by its name: [questions] float64."""
    rules = [q["rule"] for q in comparison.questions]
    return {m.name: _verdicts(rules, m.answers) for m in comparison.models}


def _verdicts(rules: Sequence[dict[str, Any]], answers: Sequence[str]) -> np.ndarray:
    verdicts = [verify.verify(rule, text) for rule, text in zip(rules, answers, strict=True)]
    return np.array([np.nan if v is None else float(v) for v in verdicts])


def _read(one: Measured, model: Model, tokenizer: Any, texts: Sequence[str], suite: SuiteSection) -> None:
    if not texts:
        return
    loss = measure.base_text_loss(model, tokenizer, texts, window=suite.window, stride=suite.stride)
    one.values["perplexity"] = Values(loss.per_token, loss.tokens)
    openings = measure.openings(texts, suite.opening_words)
    if not openings:
        return
    greedy = measure.continuations(model, tokenizer, openings, max_tokens=suite.continuation)
    end = encode.eos_id(tokenizer)  # what a reader would see ends there; the measures of repetition compare equal lengths
    one.continuations = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in greedy]
    one.values["seq_rep_4"] = Values(np.array([seq_rep_n(tokens) for tokens in greedy]))
    one.values["distinct_2"] = Values(np.array([distinct_n([tokens]) for tokens in greedy]))
    one.values["diversity"] = Values(np.array([diversity(tokens) for tokens in greedy]))
    if suite.samples:
        sampled = measure.continuations(
            model, tokenizer, openings, max_tokens=suite.continuation, temperature=suite.temperature, top_p=suite.top_p, seed=suite.seed
        )
        one.values["seq_rep_4_sampled"] = Values(np.array([seq_rep_n(tokens) for tokens in sampled]))


def _score(
    judge: tuple[Model, Any, loading.Source], questions: Sequence[Conversation], answers: Sequence[str], template: str
) -> np.ndarray:
    """The reward model's scores of the answers, [R]; an answer without a word scores nan."""
    from mlx_posttrain.data.pairs import encode_answers
    from mlx_posttrain.rl.scoring import score_rows

    model, tokenizer, source = judge
    rows = encode_answers([q.turns[:-1] for q in questions], answers, tokenizer, source.template or template, model.context)
    scores = np.full(len(answers), np.nan)
    known = [i for i, row in enumerate(rows) if row is not None]
    scores[known] = score_rows(model, [row for row in rows if row is not None], loading.pad_id(model.config, tokenizer))
    return scores


def table(comparison: Comparison) -> str:
    """The comparison for a terminal: one line a model, one column a figure, in as many tables as the width asks for."""
    from rich.console import Console
    from rich.table import Table

    names, base = comparison.metrics(), comparison.models[0]
    console = Console(width=None if Console().is_terminal else 120)  # a pipe or a file has no width of its own
    label = max(len("best possible"), *(len(m.name) for m in comparison.models))
    fitting = max(1, (console.width - label - 4) // 18)
    said = [
        f"{len(comparison.questions)} questions in the template {comparison.template!r}, greedy; 95 % bootstrap intervals"
        + (f"; * differs from {base.name} beyond chance" if len(comparison.models) > 1 else "")
    ]
    for begin in range(0, len(names), fitting):
        grid = Table()
        grid.add_column("", no_wrap=True)
        for name in names[begin : begin + fitting]:
            grid.add_column(METRICS[name].label, justify="right")
        for model in comparison.models:
            grid.add_row(model.name, *(_short(comparison, name, model) for name in names[begin : begin + fitting]))
        grid.add_section()
        grid.add_row("best possible", *(METRICS[name].ceiling.partition(":")[0] for name in names[begin : begin + fitting]), style="dim")
        with console.capture() as captured:
            console.print(grid)
        said.append(captured.get())
    return "\n".join(said)


def _short(comparison: Comparison, metric: str, model: Measured) -> str:
    value, _, interval = comparison.cell(metric, model).partition(" ")
    low, _, high = interval.strip("[]").replace("%", "").partition(", ")
    return f"{value}{'*' if comparison.sure(metric, model) else ''}\n" + (f"{low} to {high}" if interval else "")
