"""A benchmark's result as a Markdown table, a block to paste into an issue, a chart, and JSON."""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_posttrain.bench import scaling
from mlx_posttrain.bench.baselines import baseline_name
from mlx_posttrain.convert.files import write_atomically
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.card import portable

NOTE = (
    "Time against: median, smallest and largest ratio of units timed next to each other. Losses differ: the "
    "largest relative difference between losses of a unit; for another trainer, that between losses of its "
    "first batch before any update (of preferences: log-likelihoods), and how far its loss fell over the "
    "units relative to ours. Peak GB: the arrays of mlx and of what builds on it, the whole process of the "
    "others. Planned GB: what `plan` predicts. Of product peak: the matrix products that "
    "the work requires, without padding and recomputation. Of read peak: reading every weight once per token "
    "of a decode batch, where 1 is the rate of a sum on all cores. Work that was faster than a peak's own "
    "measurement is the peak."
)

COLUMNS = (
    "work",
    "engine",
    "seconds per unit",
    "seconds per step",
    "shapes",
    "rows/s",
    "trained tokens/s",
    "time against",
    "losses differ",
    "peak GB",
    "planned GB",
    "of product peak",
    "of read peak",
)


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table with a line for each engine at each kind of work."""
    lines = [_row(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for t in result["timings"]:
        if t["error"]:
            lines.append(_row([t["what"], t["engine"], t["error"], *[""] * (len(COLUMNS) - 3)]))
            continue
        seconds = statistics.median(t["seconds"])
        lines.append(
            _row(
                [
                    t["what"],
                    t["engine"],
                    f"{seconds:.2f} [{min(t['seconds']):.2f}, {max(t['seconds']):.2f}]",
                    f"{seconds / t['steps']:.3f}" if t["steps"] else "",
                    "" if t["shapes"] is None else str(t["shapes"]),
                    f"{t['rows'] / seconds:.2f}",
                    f"{t['tokens'] / seconds:.0f}",
                    _ratio(t),
                    _agreement(t),
                    f"{t['peak_gb']:.2f}",
                    "" if t["planned_gb"] is None else f"{t['planned_gb']:.2f}",
                    *(
                        "" if t[name] is None else f"{t[name]:.0%}"
                        for name in ("flops_share", "bandwidth_share")
                    ),
                ]
            )
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(t: Mapping[str, Any]) -> str:
    if t["against"] is None:
        return ""
    if t["ratio"] is None:
        return f"no ratio: {t['mismatch']}"
    return "{:.2f} [{:.2f}, {:.2f}] of ".format(*t["ratio"]) + t["against"]


def _agreement(t: Mapping[str, Any]) -> str:
    if t["disagreement"] is None:
        return ""
    fall = "" if t["fall"] is None else f"; fell {t['fall']:.2f} times as far"
    return f"{t['disagreement']:.4%}{fall}"


def _relation(r: Mapping[str, Any]) -> str:
    time = "{:.2f} [{:.2f}, {:.2f}]".format(*r["time"])
    return (
        f"{r['what']} / {r['over']} on {r['engine']}: {time} times the time, "
        f"{r['memory']:.2f} times the memory"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Machine, versions, table and notes in Markdown, to paste into an issue."""
    shape = result["shape"]
    longest = 100 if shape.get("paired") else 200
    rows = f"{shape['rows']} rows{' in pairs' if shape.get('paired') else ''} of " + (
        f"{shape['length']} tokens" if shape["length"] else f"20 to 60 and 10 to {longest} tokens"
    )
    peaks = "; ".join(
        f"{name} {p['gflops']:.0f} GFLOP/s, {p['gb_per_s']:.1f} GB/s" for name, p in result["peaks"].items()
    )
    facts = [f"{name}: {value}" for name, value in result["machine"].items()]
    facts += [
        f"model: {result['model']}",
        f"{rows}, batch {shape['batch_size']}, {result['units']} units after a warm-up",
        f"number format of frozen weights: {result.get('dtype', 'float32')}",
        f"measured peaks: {peaks}",
    ]
    versions = {baseline_name(t["engine"]): t["version"] for t in result["timings"] if t["version"]}
    facts += [f"{name}: {version}" for name, version in versions.items() if name not in result["machine"]]
    text = [f"- {fact}" for fact in facts]
    if result["timings"]:
        text += ["", table(result), "", NOTE]
    if result["relations"]:
        text += [
            "",
            "Not timed in turns, so the ranges are the extremes of all units:",
            "",
            *(f"- {_relation(r)}" for r in result["relations"]),
        ]
    for engine, scaled in result["scaling"].items():
        text += (
            ["", f"- {engine}: {scaled['error']}"]
            if "error" in scaled
            else ["", *scaling.markdown_lines(engine, scaled)]
        )
    return "\n".join(text) + "\n"


def publication(result: Mapping[str, Any], command: Sequence[str]) -> str:
    """One Markdown block for others: the machine, the command, the tables, and all numbers as JSON.

    Absolute paths in it are cut to their last part.
    """
    shown = portable({**result, "command": shlex.join(command)})
    machine = shown["machine"]
    title = ", ".join(machine[key] for key in ("chip", "memory", "system") if key in machine)
    parts = [f"### {title}", f"```sh\n{shown['command']}\n```", markdown(shown).rstrip()]
    numbers = f"```json\n{json.dumps(shown)}\n```"
    return "\n\n".join([*parts, f"<details><summary>All numbers</summary>\n\n{numbers}\n\n</details>"]) + "\n"


@contextlib.contextmanager
def reserve_folder(folder: Path) -> Iterator[None]:
    """Create the folder before anything is measured, and remove it again if the measurement fails.

    Raises UserError where it cannot be created, or holds a benchmark already.
    """
    if (folder / "bench.json").exists():
        raise UserError(f"--output {folder} holds a benchmark already: give another folder, or delete it")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be created: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            for path in created:
                path.rmdir()
        raise


def write(result: Mapping[str, Any], folder: Path, command: Sequence[str] | None = None) -> list[str]:
    """Write a benchmark's files into a folder and return their names.

    They are ``bench.json``, ``bench.md``, with a ``command`` ``publish.md`` (:func:`publication`) and, where
    an engine finished, ``bench.svg`` and ``bench.png`` with its trained or sampled tokens per second. Raises
    UserError where they cannot be written.
    """
    texts = {"bench.json": json.dumps(result, indent=2) + "\n", "bench.md": markdown(result)}
    if command is not None:
        texts["publish.md"] = publication(result, command)
    try:
        for name, text in texts.items():
            write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from None
    finished = [t for t in result["timings"] if not t["error"]]
    if finished:
        from mlx_posttrain.evaluation import charts

        def rates(t: Mapping[str, Any]) -> tuple[float, float, float]:
            median, smallest, largest = statistics.median(t["seconds"]), min(t["seconds"]), max(t["seconds"])
            return t["tokens"] / median, t["tokens"] / largest, t["tokens"] / smallest

        bars = {f"{t['what']} {t['engine']}": rates(t) for t in finished}
        charts.save(
            charts.bars(bars, y="trained or sampled tokens/s", title=str(result["model"])), folder, "bench"
        )
    return [*texts, *(["bench.svg", "bench.png"] if finished else [])]
