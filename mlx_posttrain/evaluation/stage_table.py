"""The table of a report's page, in two parts, headlines and the rest, and what changed in words."""

from __future__ import annotations

from typing import Any

from mlx_posttrain.evaluation.comparison import MIN_ROWS, Comparison, ModelResult
from mlx_posttrain.evaluation.metric_table import METRICS

#: What a reader looks for first: the first HEADLINES of these that were measured.
HEADLINE_ORDER = ("accuracy", "wins", "score", "response_loss", "perplexity", "seq_rep_4", "ended", "length")
HEADLINES = 5


def headlines(comparison: Comparison) -> list[str]:
    """The metrics of the rows that are not folded; where few of those were measured, the first others."""
    measured = comparison.metrics()
    chosen = [name for name in HEADLINE_ORDER if name in measured]
    return [*chosen, *(name for name in measured if name not in chosen)][:HEADLINES]


def opening(comparison: Comparison) -> list[str]:
    """What changed and by how much, a sentence for each model that is compared with another."""
    sentences = []
    for model in comparison.models:
        before = comparison.baseline(model)
        if before is model:
            continue
        rows = comparison.compared_rows(model)
        tested = [name for name, number in rows.items() if number >= MIN_ROWS]
        changed = [name for name in tested if comparison.is_significant(name, model)]
        shown = [name for name in headlines(comparison) if name in changed] or changed[:HEADLINES]
        if rows and not tested:
            most = max(rows.values())
            what = f"too few rows to tell what differs ({most} at most, and {MIN_ROWS} are needed)"
        elif not changed:
            what = f"nothing differs beyond chance, of {len(tested)} measured"
        else:
            what = "; ".join(_change(comparison, name, model, before) for name in shown)
            if others := len(changed) - len(shown):
                what += f"; {others} more {'measure differs' if others == 1 else 'measures differ'} (below)"
        if tested and (few := len(rows) - len(tested)):
            what += (
                f"; {few} more {'has' if few == 1 else 'have'} fewer than {MIN_ROWS} rows, too few to tell"
            )
        sentences.append(f"{model.name} against {before.name}: {what}.")
    return sentences


def _change(comparison: Comparison, name: str, model: ModelResult, before: ModelResult) -> str:
    metric, d = METRICS[name], comparison.difference(name, model)
    assert d is not None
    after = metric.format.format(model.interval(name).mean)
    if metric.null_value is not None or name not in before.values:
        return f"{metric.label} {after}"
    start = metric.format.format(before.interval(name).mean)
    text = f"{metric.label} {start} to {after}"
    if metric.better == "neither":
        return text
    tone = "better" if (d.mean > 0) == (metric.better == "higher") else "worse"
    return f"{text}, {tone}{' by less than the last digit' if start == after else ''}"


def table(comparison: Comparison, names: list[str]) -> list[dict[str, Any]]:
    """A row for each metric, with a cell for each model: value, interval as text and as a bar, change."""
    rows = []
    for name in names:
        metric = METRICS[name]
        bounds = [b for m in comparison.models if name in m.values for b in m.interval(name)]
        low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
        cells = []
        for model in comparison.models:
            value, _, interval = comparison.cell(name, model).partition(" [")
            d = comparison.difference(name, model)
            tone = ""
            if d is not None and comparison.is_significant(name, model) and metric.better != "neither":
                tone = "good" if (d.mean > 0) == (metric.better == "higher") else "bad"
            bar = [_place(b, low, high) for b in model.interval(name)] if name in model.values else []
            cells.append(
                {
                    "value": value,
                    "interval": f"[{interval}" if interval else "",
                    "bar": bar,
                    "change": comparison.difference_label(name, model) or "",
                    "tone": tone,
                }
            )
        rows.append(
            {
                "label": metric.label,
                "description": metric.description,
                "ceiling": comparison.ceiling(name),
                "cells": cells,
            }
        )
    return rows


def _place(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, in per cent."""
    return 50.0 if high <= low else round(100 * (value - low) / (high - low), 1)
