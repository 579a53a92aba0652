"""A benchmark's result as a Markdown table, a block to paste into an issue, a chart, and JSON."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.bench import peers, scaling
from mlx_posttrain.convert.files import write_atomically
from mlx_posttrain.errors import UserError

NOTE = (
    "Time against: median, least and most of the ratios of units done beside each other. Losses differ: the "
    "largest difference of a unit's loss; "
    "of a peer in training of the loss of its first batch before any update, and how far its loss fell over "
    "the units as a share of how far "
    "ours did. Peak GB: of mlx and mlx-lm the arrays, of the others the whole process. Of product peak: the "
    "products that the work asks for, "
    "padding and recomputation not counted. Of read peak: reading every weight once for each token of a "
    "decode batch, a sum on all cores being 1."
)

COLUMNS = (
    "work",
    "engine",
    "seconds a unit",
    "seconds a step",
    "shapes",
    "rows/s",
    "trained tokens/s",
    "time against",
    "losses differ",
    "peak GB",
    "of product peak",
    "of read peak",
)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a line for each engine at each kind of work."""
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
    return f"{r['what']} / {r['over']} on {r['engine']}: {time} of the time, {r['memory']:.2f} of the memory"


def block(result: Mapping[str, Any]) -> str:
    """Machine, versions and table in Markdown, for pasting."""
    shape = result["shape"]
    rows = f"{shape['rows']} rows of " + (
        f"{shape['length']} tokens" if shape["length"] else "20 to 60 and 10 to 200 tokens"
    )
    peaks = "; ".join(
        f"{name} {p['gflops']:.0f} GFLOP/s, {p['gb_per_s']:.1f} GB/s" for name, p in result["peaks"].items()
    )
    facts = [f"{name}: {value}" for name, value in result["machine"].items()]
    facts += [
        f"model: {result['model']}",
        f"{rows}, batch {shape['batch_size']}, {result['units']} units after a warm-up",
        f"measured peaks: {peaks}",
    ]
    versions = {peers.peer(t["engine"]): t["version"] for t in result["timings"] if t["version"]}
    facts += [f"{name}: {version}" for name, version in versions.items() if name not in result["machine"]]
    text = [f"- {fact}" for fact in facts]
    if result["timings"]:
        text += ["", table(result), "", NOTE]
    if result["relations"]:
        text += [
            "",
            "Not in turns, so with the extremes of all units:",
            "",
            *(f"- {_relation(r)}" for r in result["relations"]),
        ]
    for engine, found in result["scaling"].items():
        text += (
            ["", f"- {engine}: {found['error']}"] if "error" in found else ["", *scaling.lines(engine, found)]
        )
    return "\n".join(text) + "\n"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder before anything is measured for it; where that fails, it is not left behind.

    Raises UserError when it cannot be made, or holds a benchmark already.
    """
    if (folder / "bench.json").exists():
        raise UserError(f"--output {folder} holds a benchmark already: give another folder, or delete it")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for path in made:
                path.rmdir()
        raise


def write(result: Mapping[str, Any], folder: Path) -> list[str]:
    """``bench.json``, ``bench.md`` and, of trained or sampled tokens, ``bench.svg`` and ``bench.png`` in a
    folder; returns their names.

    Raises UserError when it cannot be written.
    """
    try:
        write_atomically(
            folder / "bench.json",
            lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"),
        )
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
        charts.save(
            charts.bars(figures, y="trained or sampled tokens/s", title=str(result["model"])), folder, "bench"
        )
    return ["bench.json", "bench.md", *(["bench.svg", "bench.png"] if worked else [])]
