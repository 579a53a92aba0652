"""What a grid's runs came to: a table of means over seeds, differences paired by seed, and one chart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import runs
from mlx_posttrain.console import log
from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.metrics import Interval
from mlx_posttrain.evaluation.paired_runs import over_seeds
from mlx_posttrain.pipeline.grid import Cell, value_text

NO_FIGURE = ("step", "parameters", "trained_parameters")  # in result.json, and no outcome
SEED = "seed"


@dataclass(frozen=True)
class Row:
    """One setting, over its seeds.

    values: each seed's figures. mean: by figure. interval, difference: of the compared figure over seeds, the
    latter to the first setting on the seeds that both finished. diverged: runs without a result.
    """

    at: dict[str, Any]
    values: dict[int, dict[str, float]]
    mean: dict[str, float]
    interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    diverged: int


def cost(folder: Path) -> dict[str, float]:
    """What a run's steps took: wall-clock ``seconds`` together, and the most memory, ``peak_gb``.

    Evaluations between steps are not in it. {} for a run without steps.
    """
    records = runs.Run(folder).metrics()
    found: dict[str, float] = {}
    for key, over in (("seconds", math.fsum), ("peak_gb", max)):
        values = [float(record[key]) for record in records if key in record]
        found |= {key: over(values)} if values else {}
    return found


def summarise(cells: Mapping[str, Cell], results: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[Row]]:
    """The compared figure's name and one row for each setting other than the seed, in the grid's order.

    results: result.json by stage; a run that diverged has none. Intervals are Student's t over seeds.
    Where no run has the figure that the grid asks for, the first is compared, and a line says so.
    """
    found = {
        name: {
            key: float(value)
            for key, value in results[name].items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key not in NO_FIGURE
        }
        for name in cells
        if name in results
    }
    figures = list(dict.fromkeys(key for own in found.values() for key in own))
    asked = next(iter(cells.values())).metric
    if asked is not None and figures and asked not in figures:
        log(
            f"no run has a figure called {asked!r}, so {figures[0]} is compared; there are "
            f"{', '.join(figures)}"
        )
        asked = None
    metric = asked or (figures[0] if figures else "")
    settings: dict[str, list[str]] = {}
    for name, cell in cells.items():
        settings.setdefault(_key(cell), []).append(name)
    rows: list[Row] = []
    for names in settings.values():
        values = {int(cells[n].at.get(SEED, 0)): found[n] for n in names if n in found}
        compared = [own[metric] for own in values.values() if metric in own]
        first = rows[0].values if rows else values
        pairs = [values[s][metric] - first[s][metric] for s in values if s in first]
        rows.append(
            Row(
                {key: value for key, value in cells[names[0]].at.items() if key != SEED},
                values,
                {
                    key: float(np.mean([v[key] for v in values.values() if key in v]))
                    for key in figures
                    if values
                },
                over_seeds(compared),
                float(np.mean(pairs)) if pairs else None,
                over_seeds(pairs),
                len(names) - len(values),
            )
        )
    return metric, rows


def _key(cell: Cell) -> str:
    return json.dumps({key: value for key, value in cell.at.items() if key != SEED})


def table(metric: str, rows: Sequence[Row]) -> list[str]:
    """The rows in Markdown: the compared figure, its difference to the first row, and the other figures."""
    keys, figures = list(rows[0].at), [key for key in rows[0].mean if key != metric]
    header = [*keys, "seeds", metric, "against the first", *figures]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for number, row in enumerate(rows):
        cells = [value_text(value, number) for value in row.at.values()]
        seeds = str(len(row.values)) + (f" ({row.diverged} diverged)" if row.diverged else "")
        against = "" if number == 0 else _with(row.difference, row.difference_interval, "+.4g")
        rest = [f"{row.mean[key]:.4g}" if key in row.mean else "" for key in figures]
        own = _with(row.mean.get(metric), row.interval, ".4g")
        lines.append("| " + " | ".join([*cells, seeds, own, against, *rest]) + " |")
    if any(row.interval for row in rows):
        lines += ["", "In brackets: 95 % intervals over seeds (Student's t), of differences paired by seed."]
    if len(rows) > 2:
        lines += ["The best of several settings looks better than it is: judge it on other rows."]
    return lines


def _with(value: float | None, interval: Interval | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{form}}" + (f" [{interval.low:{form}}, {interval.high:{form}}]" if interval else "")


def chart(metric: str, rows: Sequence[Row]) -> Any:
    """The compared figure: against the setting where that is one number, else a bar for each setting."""
    rows = [row for row in rows if metric in row.mean]
    keys = list(rows[0].at) if rows else []
    numbers = [row.at[keys[0]] for row in rows] if len(keys) == 1 else []
    if len(numbers) > 1 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        order = np.argsort(numbers)
        xs, ys = [numbers[i] for i in order], [rows[i].mean[metric] for i in order]
        each = [
            (rows[i].at[keys[0]], v[metric]) for i in order for v in rows[i].values.values() if metric in v
        ]
        figure = charts.curves(
            {"mean": (xs, ys)},
            x=keys[0],
            y=metric,
            points={"mean": tuple(zip(*each, strict=True))},  # type: ignore[dict-item]
        )
        if min(xs) > 0 and max(xs) / min(xs) >= 20:
            figure.axes[0].set_xscale("log")
        return figure
    labels = [" ".join(value_text(v, n) for v in row.at.values()) or metric for n, row in enumerate(rows)]
    intervals = [row.interval or Interval(*[row.mean[metric]] * 3) for row in rows]
    return charts.bars(dict(zip(labels, intervals, strict=True)), y=metric)


def write(folder: Path, name: str, cells: Mapping[str, Cell], results: Mapping[str, Any]) -> list[str]:
    """Write NAME.md, NAME.json, and the chart as NAME.svg and NAME.png; returns the table's lines."""
    metric, rows = summarise(cells, results)
    lines = table(metric, rows)
    runs.write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    kept = [
        {
            "settings": row.at,
            "seeds": row.values,
            "mean": row.mean,
            "interval": row.interval and [row.interval.low, row.interval.high],
            "difference": row.difference,
            "difference_interval": row.difference_interval
            and [row.difference_interval.low, row.difference_interval.high],
            "diverged": row.diverged,
        }
        for row in rows
    ]
    runs.write_text(folder / f"{name}.json", json.dumps({"metric": metric, "rows": kept}, indent=2) + "\n")
    if any(row.values for row in rows):
        charts.save(chart(metric, rows), folder, name)
    return lines
