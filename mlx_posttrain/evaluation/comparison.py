"""Results of several models on one suite: their metrics, the differences between them, and a table of both.

Every metric is a mean of values per row. The values are kept, so that the difference between two models is
drawn over the same rows (metrics.paired_bootstrap).
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.evaluation.metric_table import METRICS
from mlx_posttrain.evaluation.metrics import (
    Interval,
    bootstrap,
    holm,
    paired_bootstrap,
    proportion,
    sign_flip,
)
from mlx_posttrain.rewards import verify

# fewer rows are too few to call a difference significant
MIN_ROWS = 20
LEVEL = 0.05

#: What "beyond chance" means, for readers of a table.
SIGNIFICANCE_NOTE = (
    "p < .05 in a sign-flip test over the rows, with Holm's correction for the number of models compared"
)


class Values(NamedTuple):
    """One model's values of a metric and their weights, [R] each; the metric is their weighted mean."""

    rows: np.ndarray
    weights: np.ndarray | None = None


class Coherence(NamedTuple):
    """Which model judged the coherence of continuations, and its loss on those that people wrote."""

    judge: str
    human: Values


@dataclass
class ModelResult:
    """What one model did on the suite."""

    name: str
    path: str
    values: dict[str, Values] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)  # greedy, one per question
    continuations: list[list[int]] = field(default_factory=list)  # greedy, one per base text
    template: str = ""  # of its prompts
    baseline_index: int = 0  # place in the comparison of the model that it is compared with
    seed: int = 0  # of its intervals
    answer_kl: float | None = None  # nats from the baseline, of answers that come from no run of their own

    def interval(self, metric: str) -> Interval:
        """Mean and 95 % interval, by metrics.proportion for a proportion and else by the bootstrap."""
        rows, weights = self.values[metric]
        if METRICS[metric].is_proportion:
            return proportion(rows, weights=weights, seed=self.seed)
        return bootstrap(rows, weights=weights, transform=METRICS[metric].transform, seed=self.seed)


@dataclass
class Comparison:
    """Several models on one suite, each compared with its baseline.

    The baseline is the first model, or the one at the model's ``baseline_index``.
    """

    suite: dict[str, Any]
    template: str  # the suite's: one for all, or own
    models: list[ModelResult]
    questions: list[dict[str, Any]]  # prompt, expected answer, family, and the row that the rule reads
    coherence: Coherence | None = None  # None where nothing was continued
    where: str = ""  # the questions are from, in words
    # places of the models that differ significantly, by metric
    _significant: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int:
        """The suite's seed, which fixes intervals and tests."""
        return int(self.suite.get("seed", 0))

    @property
    def baseline_label(self) -> str:
        """What the models are compared with, in words."""
        return (
            self.models[0].name
            if all(m.baseline_index == 0 for m in self.models)
            else "the model that each started from"
        )

    def baseline(self, model: ModelResult) -> ModelResult:
        """The model that ``model`` is compared with; itself where it is a baseline."""
        return self.models[model.baseline_index]

    def metrics(self) -> list[str]:
        """Names of the metrics that any model has, in the order of ``METRICS``."""
        return [name for name in METRICS if any(name in m.values for m in self.models)]

    def ceiling(self, metric: str) -> str:
        """The best possible value of a metric, in words; of coherence it is that of human text."""
        human = self.human_coherence()
        if human is None or not metric.startswith("coherence"):
            return METRICS[metric].ceiling
        return f"human text {human.mean:.1f}"

    def human_coherence(self) -> Interval | None:
        """Perplexity of human continuations under the judge; None where nothing was continued."""
        if self.coherence is None:
            return None
        rows, weights = self.coherence.human
        return bootstrap(rows, weights=weights, transform=math.exp, seed=self.seed)

    def coherence_note(self) -> str:
        """What coherence is compared with, in words; "" where nothing was continued."""
        human = self.human_coherence()
        if self.coherence is None or human is None:
            return ""
        return (
            f"Coherence is the perplexity of continuations under {Path(self.coherence.judge).name}, which "
            f"gives {human.mean:.1f} [{human.low:.1f}, {human.high:.1f}] to human text after the same "
            "openings. Lower is not better: text that repeats itself is easy to predict and lies below human "
            "text, text that falls apart above it; the judge's own greedy text always lies low."
        )

    def notes(self) -> list[str]:
        """What must be known to read the table, in words: which answers are not judged, and coherence."""
        unjudged = verify.unjudged(q["rule"] for q in self.questions)
        return [
            *([f"Right answers: {unjudged}."] if unjudged else []),
            *filter(None, [self.coherence_note()]),
        ]

    def questions_label(self) -> str:
        """How many questions are asked, from where, and in which templates, in words."""
        what = f"{len(self.questions)} questions {self.where}".strip()
        return f"{what}, {self.templates_label()}"

    def templates_label(self) -> str:
        """The templates of the models' prompts, in words."""
        names: dict[str, list[str]] = {}
        for m in self.models:
            names.setdefault(m.template, []).append(m.name)
        if len(names) == 1:
            return f"all in the template {self.models[0].template!r}"
        return (
            "each in its own template ("
            + "; ".join(f"{', '.join(users)}: {template}" for template, users in names.items())
            + ")"
        )

    def _pair(
        self, metric: str, model: ModelResult
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
        """(rows, the baseline's rows, weights).

        None where no row has both, or where the two models read base text in different windows.
        """
        base, null_value = self.baseline(model), METRICS[metric].null_value
        if model is base or metric not in model.values:
            return None
        rows = model.values[metric].rows
        other = base.values.get(metric) if null_value is None else Values(np.full(len(rows), null_value))
        if other is None or rows.shape != other.rows.shape or not np.isfinite(rows - other.rows).any():
            return None
        return rows, other.rows, other.weights

    def paired_rows(self, metric: str, model: ModelResult) -> int:
        """Number of rows over which a model is compared with its baseline."""
        pair = self._pair(metric, model)
        return 0 if pair is None else int(np.isfinite(pair[0] - pair[1]).sum())

    def compared_rows(self, model: ModelResult | None = None) -> dict[str, int]:
        """Rows over which each metric is compared, at most; of ``model`` alone where it is given.

        Metrics in which nothing is compared are left out; below MIN_ROWS rows no difference is tested.
        """
        models = self.models if model is None else [model]
        rows = {name: max(self.paired_rows(name, m) for m in models) for name in self.metrics()}
        return {name: number for name, number in rows.items() if number}

    def difference(self, metric: str, model: ModelResult) -> Interval | None:
        """``model`` minus its baseline over the same rows; None where there is nothing to compare.

        It is in the unit of the rows, which is nats for a perplexity. For a metric that the baseline cannot
        have (wins) it is the metric minus its ``null_value``.
        """
        pair, null_value = self._pair(metric, model), METRICS[metric].null_value
        if pair is None:
            return None
        if null_value is not None:
            return Interval(*(bound - null_value for bound in model.interval(metric)))
        return paired_bootstrap(pair[0], pair[1], weights=pair[2], seed=self.seed)

    def is_significant(self, metric: str, model: ModelResult) -> bool:
        """Whether the difference from the baseline is beyond chance.

        That is so where metrics.sign_flip rejects chance at LEVEL, with Holm's correction over all models
        compared in this metric over at least MIN_ROWS rows, and 0 lies outside the 95 % interval of the
        difference, so that an interval and its mark never contradict each other. Where no model differs from
        its baseline, one comparison in twenty marks any.
        """
        if metric not in self._significant:
            self._significant[metric] = self._significant_models(metric)
        return any(self.models[place] is model for place in self._significant[metric])

    def _significant_models(self, metric: str) -> list[int]:
        pairs = [
            (place, self._pair(metric, m))
            for place, m in enumerate(self.models)
            if self.paired_rows(metric, m) >= MIN_ROWS
        ]
        p_values = [
            sign_flip(pair[0], pair[1], weights=pair[2], seed=self.seed)
            for _, pair in pairs
            if pair is not None
        ]
        places = [
            place for (place, _), rejected in zip(pairs, holm(p_values, LEVEL), strict=True) if rejected
        ]
        differences = {place: self.difference(metric, self.models[place]) for place in places}
        return [place for place, d in differences.items() if d is not None and (d.low > 0 or d.high < 0)]

    def to_dict(self) -> dict[str, Any]:
        """All metrics with intervals and differences, for comparison.json."""
        return {
            "suite": self.suite,
            "template": self.template,
            "questions": {"number": len(self.questions), "from": self.where},
            "baseline": self.models[0].name,
            "beyond_chance": SIGNIFICANCE_NOTE,
            "metrics": {
                name: {
                    "label": METRICS[name].label,
                    "better": METRICS[name].better,
                    "ceiling": self.ceiling(name),
                    "about": METRICS[name].description,
                }
                for name in self.metrics()
            },
            "coherence": None
            if self.coherence is None
            else {"judge": self.coherence.judge, "human": self.human_coherence()},
            "models": [
                {
                    "name": m.name,
                    "path": m.path,
                    "template": m.template,
                    "baseline": self.baseline(m).name,
                    "figures": {name: m.interval(name)._asdict() for name in m.values},
                    "minus_baseline": {
                        name: d._asdict() for name in m.values if (d := self.difference(name, m)) is not None
                    },
                    "beyond_chance": [name for name in m.values if self.is_significant(name, m)],
                    "too_few_rows": [name for name, n in self.compared_rows(m).items() if n < MIN_ROWS],
                }
                for m in self.models
            ],
        }

    def cell(self, metric: str, model: ModelResult) -> str:
        """A metric with its interval as text; '-' where it was not measured."""
        if metric not in model.values:
            return "-"
        form, value = METRICS[metric].format, model.interval(metric)
        return f"{form.format(value.mean)} [{form.format(value.low)}, {form.format(value.high)}]"

    def difference_label(self, metric: str, model: ModelResult) -> str | None:
        """The difference from the baseline in words; None where there is nothing to compare."""
        d = self.difference(metric, model)
        if d is None:
            return None
        nats = METRICS[metric].transform is not None
        form = "{:+.3f}" if nats else METRICS[metric].format.replace("{:", "{:+").replace("++", "+")
        bounds = f"{form.format(d.mean)} [{form.format(d.low)}, {form.format(d.high)}]"
        return f"{bounds} nats" if nats else bounds

    def significance_note(self, mark: str) -> str:
        """What a mark beside a difference means, and which metrics have too few rows for a test, in words."""
        rows = self.compared_rows()
        few = {name: number for name, number in rows.items() if number < MIN_ROWS}
        if few and len(few) == len(rows):
            return (
                f"Too few rows to tell a difference from chance: {max(few.values())} at most, and {MIN_ROWS} "
                "are needed"
            )
        note = f"{mark} beyond chance: {SIGNIFICANCE_NOTE}"
        if few:
            labels = ", ".join(f"{METRICS[name].label} ({number})" for name, number in few.items())
            note += f". Too few rows to tell ({MIN_ROWS} are needed): {labels}"
        return note

    def table(self) -> str:
        """The comparison for a terminal: one line per model and one column per metric.

        Columns that do not fit the terminal's width go into further tables.
        """
        from rich.console import Console
        from rich.table import Table

        names = self.metrics()
        # a pipe or a file has no width of its own
        console = Console(width=None if Console().is_terminal else 120)
        label = max(len("best possible"), *(len(m.name) for m in self.models))
        fitting = max(1, (console.width - label - 4) // 18)
        header = [f"{self.questions_label()}, greedy; with 95 % intervals"]
        if len(self.models) > 1:
            header.append(self.significance_note(f"* differs from {self.baseline_label}"))
        header += self.notes()
        text = [textwrap.fill(line, console.width) for line in header]
        for begin in range(0, len(names), fitting):
            grid = Table()
            grid.add_column("", no_wrap=True)
            for name in names[begin : begin + fitting]:
                grid.add_column(METRICS[name].label, justify="right")
            for model in self.models:
                grid.add_row(
                    model.name, *(self._table_cell(name, model) for name in names[begin : begin + fitting])
                )
            grid.add_section()
            grid.add_row(
                "best possible",
                *(self.ceiling(name).partition(":")[0] for name in names[begin : begin + fitting]),
                style="dim",
            )
            with console.capture() as captured:
                console.print(grid)
            text.append(captured.get())
        return "\n".join(text)

    def _table_cell(self, metric: str, model: ModelResult) -> str:
        value, _, interval = self.cell(metric, model).partition(" ")
        low, _, high = interval.strip("[]").replace("%", "").partition(", ")
        return f"{value}{'*' if self.is_significant(metric, model) else ''}\n" + (
            f"{low} to {high}" if interval else ""
        )


def paired_test(a: ModelResult, b: ModelResult, metric: str, seed: int) -> tuple[float, float | None]:
    """The sum of the weighted differences a - b over rows, and its p-value by a sign-flip test.

    The p-value is None where fewer than MIN_ROWS rows have both values.
    """
    (rows, weights), (others, _) = a.values[metric], b.values[metric]
    if rows.shape != others.shape or np.isfinite(rows - others).sum() < MIN_ROWS:
        return 0.0, None
    total = float(np.nansum((rows - others) * (1.0 if weights is None else weights)))
    return total, sign_flip(rows, others, weights=weights, seed=seed)
