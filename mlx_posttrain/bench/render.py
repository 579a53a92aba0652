"""A benchmark's result as a Markdown table, a block to paste into an issue, a chart, and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_posttrain.convert.files import write_atomically
from mlx_posttrain.errors import UserError


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a line for each engine at each kind of work."""
    lines = [
        "| work | engine | seconds a unit | rows/s | trained tokens/s | time / first | peak GB | of product peak | of read peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for t in result["timings"]:
        if t["error"]:
            lines.append(f"| {t['what']} | {t['engine']} | {t['error']} | | | | | | |")
            continue
        seconds = statistics.median(t["seconds"])
        spread = f"{seconds:.2f} [{min(t['seconds']):.2f}, {max(t['seconds']):.2f}]"
        shares = [f"{t[name]:.0%}" if t[name] is not None else "" for name in ("flops_share", "bandwidth_share")]
        cells = [
            t["what"],
            t["engine"],
            spread,
            f"{t['rows'] / seconds:.2f}",
            f"{t['tokens'] / seconds:.0f}",
            _ratio(t),
            f"{t['peak_gb']:.2f}",
        ]
        lines.append("| " + " | ".join([*cells, *shares]) + " |")
    return "\n".join(lines)


def _ratio(t: Mapping[str, Any]) -> str:
    if t["disagreement"] is None:
        return "1"
    if t["ratio"] is None:
        return f"no ratio: losses differ by {t['disagreement']:.1%}"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*t["ratio"])


def block(result: Mapping[str, Any]) -> str:
    """Machine, versions and table in Markdown, for pasting."""
    shape = result["shape"]
    rows = f"{shape['rows']} rows of " + (f"{shape['length']} tokens" if shape["length"] else "20 to 60 and 10 to 200 tokens")
    peaks = "; ".join(f"{name} {p['gflops']:.0f} GFLOP/s, {p['gb_per_s']:.1f} GB/s" for name, p in result["peaks"].items())
    facts = [f"{name}: {value}" for name, value in result["machine"].items()]
    facts += [
        f"model: {result['model']}",
        f"{rows}, batch {shape['batch_size']}, {result['units']} units after a warm-up",
        f"measured peaks: {peaks}",
    ]
    note = (
        "Time / first: median, least and most of the ratios of units done beside each other. Peak GB: of mlx and mlx-lm the arrays, of torch "
        "and trl the whole process."
    )
    return "\n".join([*(f"- {fact}" for fact in facts), "", table(result), "", note]) + "\n"


def claim(folder: Path) -> None:
    """Make the folder, before anything is measured for it. Raises UserError when it cannot be, or holds a benchmark already."""
    if (folder / "bench.json").exists():
        raise UserError(f"--output {folder} holds a benchmark already: give another folder, or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made: {error.strerror}") from None


def write(result: Mapping[str, Any], folder: Path) -> None:
    """``bench.json``, ``bench.md``, ``bench.svg`` and ``bench.png`` in a folder. Raises UserError when it cannot be written."""
    try:
        write_atomically(folder / "bench.json", lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))
        write_atomically(folder / "bench.md", lambda path: path.write_text(block(result), encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None
    worked = [t for t in result["timings"] if not t["error"]]
    if worked:
        from mlx_posttrain.evaluate import charts

        def rates(t: Mapping[str, Any]) -> tuple[float, float, float]:
            middle, least, most = statistics.median(t["seconds"]), min(t["seconds"]), max(t["seconds"])
            return t["tokens"] / middle, t["tokens"] / most, t["tokens"] / least

        figures = {f"{t['what']} {t['engine']}": rates(t) for t in worked}
        charts.save(charts.bars(figures, y="trained or sampled tokens/s", title=str(result["model"])), folder, "bench")
