"""What several models did on one suite: their figures, the differences between them, and the table of both.

Every figure is a mean of values per row, which stay, so that a difference between two models is drawn over
the same rows (metrics.paired_bootstrap). What a figure's ceiling is, and which way is better, stands beside
it in ``METRICS``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mlx_posttrain.evaluate.metrics import Interval, bootstrap, holm, paired_bootstrap, share, sign_flip

# below this many rows a percentile interval is too narrow to call a difference beyond chance
MIN_ROWS = 20
LEVEL = 0.05

#: What "beyond chance" means, for whoever reads a table.
BEYOND_CHANCE = (
    "p < .05 by a sign-flip test over the rows, after Holm's correction for the models that a "
    "figure is compared for"
)

#: Figures per token, which mean nothing across tokenizers.
PER_TOKEN = (
    "response_loss",
    "perplexity",
    "kl",
    "length",
    "length_sampled",
    *(f"{name}{how}" for name in ("seq_rep_4", "distinct_2", "diversity") for how in ("", "_sampled")),
)


class Metric(NamedTuple):
    """A figure: how it is written, which way is better, and what is the best that can be had."""

    label: str
    form: str
    better: Literal["higher", "lower", "neither"]
    ceiling: str
    about: str
    # monotone, laid on mean and bounds: exp makes a loss a perplexity
    of: Callable[[float], float] | None = None
    even: float | None = None  # what the figure is held against where the baseline has none

    @property
    def share(self) -> bool:
        """Whether it is a share, which are the figures written in per cent."""
        return self.form.endswith("%}")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "right answers",
        "{:.1%}",
        "higher",
        "100 %",
        "greedy answers that the row's rule accepts; contents no run was trained on",
    ),
    "accuracy_phrasing": Metric(
        "right, unseen phrasing",
        "{:.1%}",
        "higher",
        "100 %",
        "the same for known contents in words no run was trained on",
    ),
    "accuracy_sampled": Metric(
        "right answers, sampled",
        "{:.1%}",
        "higher",
        "100 %",
        "mean over several sampled answers to each question",
    ),
    "response_loss": Metric("response loss", "{:.3f}", "lower", "0", "nats per token of the wanted answers"),
    "perplexity": Metric(
        "base-text perplexity",
        "{:.1f}",
        "lower",
        "1",
        "of plain text, in windows, each token scored once",
        math.exp,
    ),
    "kl": Metric(
        "KL from the baseline",
        "{:.3f}",
        "neither",
        "0: unchanged",
        "KL(baseline || model) on plain text, nats per token",
    ),
    "last_word": Metric(
        "last word", "{:.1%}", "higher", "100 %", "texts whose last word greedy decoding finds"
    ),
    "last_word_perplexity": Metric(
        "last-word perplexity", "{:.1f}", "lower", "1", "exp of the last word's mean cost", math.exp
    ),
    "seq_rep_4": Metric(
        "repetition",
        "{:.3f}",
        "lower",
        "0",
        "seq-rep-4 of greedy continuations, all of "
        "one length, the end of text forbidden: share "
        "of 4-grams that came before",
    ),
    "distinct_2": Metric(
        "distinct-2",
        "{:.3f}",
        "higher",
        "1",
        "share of different 2-grams in all greedy "
        "continuations together: low as well where "
        "a model says one thing of everything",
    ),
    "diversity": Metric(
        "diversity", "{:.3f}", "higher", "1", "product of 1 - seq-rep-n, n = 2..4, of greedy continuations"
    ),
    "seq_rep_4_sampled": Metric(
        "repetition, sampled",
        "{:.3f}",
        "lower",
        "0",
        "seq-rep-4 of sampled continuations, mean over those of a text",
    ),
    "distinct_2_sampled": Metric(
        "distinct-2, sampled", "{:.3f}", "higher", "1", "the same of sampled continuations"
    ),
    "diversity_sampled": Metric(
        "diversity, sampled", "{:.3f}", "higher", "1", "diversity of sampled continuations"
    ),
    "ended": Metric(
        "ended by itself", "{:.0%}", "neither", "100 %", "greedy answers that ended before the limit"
    ),
    "length": Metric("answer tokens", "{:.1f}", "neither", "the limit", "tokens of the greedy answers"),
    "ended_sampled": Metric(
        "ended, sampled", "{:.0%}", "neither", "100 %", "sampled answers that ended before the limit"
    ),
    "length_sampled": Metric(
        "answer tokens, sampled", "{:.1f}", "neither", "the limit", "tokens of the sampled answers"
    ),
    "score": Metric(
        "reward score",
        "{:+.2f}",
        "higher",
        "none",
        "the reward model's score of the greedy answers; an empty one has the lowest that any answer got",
    ),
    "wins": Metric(
        "wins, length-controlled",
        "{:.1%}",
        "higher",
        "100 %; baseline 50 %",
        "share of answers that the reward model prefers to the baseline's, were both of one "
        "length; an empty one loses; against 50 %",
        even=0.5,
    ),
}


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
    # greedy, one per base text, those that repetition is measured on
    continuations: list[list[int]] = field(default_factory=list)
    template: str = ""  # in which it was asked
    origin: int = 0  # place in the comparison of the model that it is compared with
    seed: int = 0  # of its intervals

    def figure(self, metric: str) -> Interval:
        """Mean and 95 % interval: by metrics.share for a share, by the bootstrap for anything else."""
        rows, weights = self.values[metric]
        if METRICS[metric].share:
            return share(rows, weights=weights, seed=self.seed)
        return bootstrap(rows, weights=weights, of=METRICS[metric].of, seed=self.seed)


@dataclass
class Comparison:
    """Several models on one suite, each compared with its baseline: the first of them, or the one that its
    ``origin`` names.
    """

    suite: dict[str, Any]
    template: str  # the suite's: one for all, or own
    models: list[Measured]
    questions: list[dict[str, Any]]  # prompt, wanted, family, and the row that the answer's rule reads
    # places of the models that differ, by metric
    _sure: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int:
        """The suite's, which fixes intervals and tests."""
        return int(self.suite.get("seed", 0))

    @property
    def compared_with(self) -> str:
        """In words, what differences are taken from."""
        return (
            self.models[0].name
            if all(m.origin == 0 for m in self.models)
            else "the model that each started from"
        )

    def baseline(self, model: Measured) -> Measured:
        """What a model is compared with: itself where it is a baseline."""
        return self.models[model.origin]

    def metrics(self) -> list[str]:
        """Names of what was measured, in the order of ``METRICS``."""
        return [name for name in METRICS if any(name in m.values for m in self.models)]

    def asked(self) -> str:
        """In words, in which templates the models were asked."""
        names: dict[str, list[str]] = {}
        for m in self.models:
            names.setdefault(m.template, []).append(m.name)
        if len(names) == 1:
            return f"all in the template {self.models[0].template!r}"
        return (
            "each in its own template ("
            + "; ".join(f"{', '.join(who)}: {template}" for template, who in names.items())
            + ")"
        )

    def _pair(self, metric: str, model: Measured) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """(rows, the baseline's rows, weights); None where no row has both, or where texts were read in other
        windows.
        """
        base, even = self.baseline(model), METRICS[metric].even
        if model is base or metric not in model.values:
            return None
        rows = model.values[metric].rows
        theirs = base.values.get(metric) if even is None else Values(np.full(len(rows), even))
        if theirs is None or rows.shape != theirs.rows.shape or not np.isfinite(rows - theirs.rows).any():
            return None
        return rows, theirs.rows, theirs.weights

    def rows(self, metric: str, model: Measured) -> int:
        """Over how many rows a model is compared with its baseline."""
        pair = self._pair(metric, model)
        return 0 if pair is None else int(np.isfinite(pair[0] - pair[1]).sum())

    def difference(self, metric: str, model: Measured) -> Interval | None:
        """``model`` minus its baseline over the same rows, in the unit of the rows (nats where the figure is
        a perplexity).

        Of a metric that the baseline cannot have, wins, what the figure has above ``even``.
        """
        pair, even = self._pair(metric, model), METRICS[metric].even
        if pair is None:
            return None
        if even is not None:
            return Interval(*(bound - even for bound in model.figure(metric)))
        return paired_bootstrap(pair[0], pair[1], weights=pair[2], seed=self.seed)

    def sure(self, metric: str, model: Measured) -> bool:
        """Whether the difference to the baseline is beyond chance.

        It is where metrics.sign_flip rejects chance at LEVEL after Holm's correction over all models compared
        in this metric over at least MIN_ROWS rows, and 0 lies outside the 95 % interval of the difference, so
        that a figure and its mark never contradict each other. In a metric in which no model differs from its
        baseline, one comparison in twenty marks any.
        """
        if metric not in self._sure:
            self._sure[metric] = self._beyond_chance(metric)
        return any(self.models[place] is model for place in self._sure[metric])

    def _beyond_chance(self, metric: str) -> list[int]:
        pairs = [
            (place, self._pair(metric, m))
            for place, m in enumerate(self.models)
            if self.rows(metric, m) >= MIN_ROWS
        ]
        p_values = [
            sign_flip(pair[0], pair[1], weights=pair[2], seed=self.seed)
            for _, pair in pairs
            if pair is not None
        ]
        places = [
            place for (place, _), rejected in zip(pairs, holm(p_values, LEVEL), strict=True) if rejected
        ]
        gaps = {place: self.difference(metric, self.models[place]) for place in places}
        return [place for place, d in gaps.items() if d is not None and (d.low > 0 or d.high < 0)]

    def to_dict(self) -> dict[str, Any]:
        """All figures with intervals and differences, for comparison.json."""
        return {
            "suite": self.suite,
            "template": self.template,
            "baseline": self.models[0].name,
            "beyond_chance": BEYOND_CHANCE,
            "metrics": {
                name: {
                    "label": METRICS[name].label,
                    "better": METRICS[name].better,
                    "ceiling": METRICS[name].ceiling,
                    "about": METRICS[name].about,
                }
                for name in self.metrics()
            },
            "models": [
                {
                    "name": m.name,
                    "path": m.path,
                    "template": m.template,
                    "baseline": self.baseline(m).name,
                    "figures": {name: m.figure(name)._asdict() for name in m.values},
                    "minus_baseline": {
                        name: d._asdict() for name in m.values if (d := self.difference(name, m)) is not None
                    },
                    "beyond_chance": [name for name in m.values if self.sure(name, m)],
                }
                for m in self.models
            ],
        }

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
        form = (
            "{:+.3f}" if METRICS[metric].of else METRICS[metric].form.replace("{:", "{:+").replace("++", "+")
        )
        sure = "" if self.sure(metric, model) else ": no difference that these rows can show"
        return f"{form.format(d.mean)} [{form.format(d.low)}, {form.format(d.high)}] {unit}".strip() + sure


def table(comparison: Comparison) -> str:
    """The comparison for a terminal: one line a model, one column a figure, in as many tables as the width
    asks for.
    """
    from rich.console import Console
    from rich.table import Table

    names = comparison.metrics()
    # a pipe or a file has no width of its own
    console = Console(width=None if Console().is_terminal else 120)
    label = max(len("best possible"), *(len(m.name) for m in comparison.models))
    fitting = max(1, (console.width - label - 4) // 18)
    said = [
        f"{len(comparison.questions)} questions, {comparison.asked()}, greedy; 95 % intervals, each "
        "figure's own"
        + (
            f"\n* differs from {comparison.compared_with} beyond chance: {BEYOND_CHANCE}"
            if len(comparison.models) > 1
            else ""
        )
    ]
    said = [textwrap.fill(line, console.width) for line in "\n".join(said).splitlines()]
    for begin in range(0, len(names), fitting):
        grid = Table()
        grid.add_column("", no_wrap=True)
        for name in names[begin : begin + fitting]:
            grid.add_column(METRICS[name].label, justify="right")
        for model in comparison.models:
            grid.add_row(
                model.name, *(_short(comparison, name, model) for name in names[begin : begin + fitting])
            )
        grid.add_section()
        grid.add_row(
            "best possible",
            *(METRICS[name].ceiling.partition(":")[0] for name in names[begin : begin + fitting]),
            style="dim",
        )
        with console.capture() as captured:
            console.print(grid)
        said.append(captured.get())
    return "\n".join(said)


def _short(comparison: Comparison, metric: str, model: Measured) -> str:
    value, _, interval = comparison.cell(metric, model).partition(" ")
    low, _, high = interval.strip("[]").replace("%", "").partition(", ")
    return f"{value}{'*' if comparison.sure(metric, model) else ''}\n" + (
        f"{low} to {high}" if interval else ""
    )
