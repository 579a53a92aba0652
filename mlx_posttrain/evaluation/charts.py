"""Charts of a report, drawn with matplotlib: each is a function from plain numbers to a figure.

A figure goes into the page as SVG whose ink is ``currentColor``, so that it follows the page's light or dark
scheme, and into a folder next to the page as SVG and PNG on white. Six colours are Okabe and Ito's (2008),
which people with colour vision deficiency can tell apart; lines differ in dash as well.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.errors import UserError

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8a8a8a",
    "#B8A800",
    "#8F6BC1",
    "#B5651D",
)
DASHES = ("-", "--", "-.", ":")
_INK = "#010203"  # stands for currentColor until the SVG is written

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


#: Series that keep their colour in every chart of a report, in the order of the colours; others follow them.
SERIES_ORDER: ContextVar[tuple[str, ...]] = ContextVar("SERIES_ORDER", default=())


def series_style(name: str, number: int) -> dict[str, Any]:
    """Colour and dash of the series called ``name``, which is number ``number`` of its chart."""
    known = SERIES_ORDER.get()
    run = next((part for part in name.split(", ") if part in known), name)  # "sft, thinking" is of sft
    place = known.index(run) if run in known else len(known) + number
    # when colours repeat, the dashes differ
    dash = place // 2 + place // len(COLOURS)
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[dash % len(DASHES)]}


def _axes(columns: int = 1, width: float = 4.6, height: float = 3.0, **options: Any) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,
            "svg.hashsalt": "mlx-posttrain",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "text.color": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "legend.frameon": False,
            "axes.titlesize": 10,
            "legend.fontsize": 8,
        }
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def curves(
    series: Mapping[str, Curve], *, x: str, y: str, title: str = "", points: Mapping[str, Curve] | None = None
) -> Any:
    """One line per name.

    points: series drawn as marks in the colour of the line of the same name, such as evaluations.
    """
    figure, (axis,) = _axes(width=4.4)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        axis.plot(xs, ys, label=name, linewidth=1.4, **series_style(name, number))
        if points and name in points:
            axis.plot(*points[name], "o", markersize=4, color=series_style(name, number)["color"])
    axis.set(xlabel=x, ylabel=y, title=title)
    _legend(figure, len(series))
    return figure


def _legend(figure: Any, count: int) -> None:
    """Names below the axes, where they lie on no line and no other name; few ticks, for the same reason."""
    for axis in figure.axes:
        axis.locator_params(axis="x", nbins=4)
    figure.legend(loc="outside lower center", ncols=min(3, count))


def bars(
    intervals: Mapping[str, tuple[float, float, float]],
    *,
    y: str,
    title: str = "",
    ceiling: float | None = None,
    log: bool = False,
) -> Any:
    """One bar per name with its interval (mean, low, high); ``ceiling`` is drawn as a line."""
    count = len(intervals)
    # All charts have the same width on the page, where the text of a wide figure would be small.
    figure, (axis,) = _axes(width=min(max(3.6, 0.75 * count + 1.6), max(5.2, 0.4 * count)))
    for number, (name, (mean, low, high)) in enumerate(intervals.items()):
        axis.bar(
            number,
            mean,
            color=series_style(name, number)["color"],
            width=0.7,
            yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
            ecolor=_INK,
            capsize=3,
        )
    # a name as long as a path would leave no room for bars
    labels = [name if len(name) <= 20 else "…" + name[-19:] for name in intervals]
    axis.set_xticks(
        range(count), labels, rotation=25 if count > 4 else 0, ha="right" if count > 4 else "center"
    )
    if ceiling is not None:
        axis.axhline(ceiling, linestyle=":", linewidth=1, color=_INK)
        axis.annotate(
            "ceiling", (1, ceiling), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    if log and (positive := [bound for one in intervals.values() for bound in one if bound > 0]):
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axis.set_yscale("log")
        low, high = min(positive) / 1.3, max(positive) * 1.1
        axis.set_ylim(low, high)
        axis.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set(ylabel=y, title=title)
    return figure


def log_ticks(low: float, high: float) -> list[float]:
    """Three to nine plain numbers between two positive bounds, for a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1)
    fits = [
        [factor * 10.0**k for k in decades for factor in factors if low <= factor * 10.0**k <= high]
        for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0))
    ]
    for ticks in fits:
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 9)]
    # a narrow range has none of those: even steps of a round size
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next((s * size for s in (5.0, 2.0) if (high - low) / (s * size) >= 3), size)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scatter(series: Mapping[str, Curve], *, x: str, y: str, title: str = "", path: bool = False) -> Any:
    """One set of points per name.

    path: join the points of a name in their order and draw the last one larger, such as a run's path through
    KL and reward.
    """
    figure, (axis,) = _axes(width=4.4)
    for number, (name, (xs, ys)) in enumerate(series.items()):
        line_style = series_style(name, number)
        if path:
            axis.plot(xs, ys, linewidth=1.2, marker="o", markersize=3, label=name, **line_style)
            axis.plot(xs[-1:], ys[-1:], "o", markersize=8, color=line_style["color"])
        else:
            axis.plot(xs, ys, "o", markersize=7, label=name, color=line_style["color"])
    axis.set(xlabel=x, ylabel=y, title=title)
    _legend(figure, len(series))
    return figure


def heatmap(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    low: float = -1.0,
    high: float = 1.0,
) -> Any:
    """A matrix as colours, with its numbers written into the cells."""
    figure, (axis,) = _axes(width=0.75 * len(columns) + 1.8, height=0.5 * len(rows) + 1.4)
    image = axis.imshow(values, vmin=low, vmax=high, cmap="PuOr_r", aspect="auto")
    axis.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right")
    axis.set_yticks(range(len(rows)), list(rows))
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]):
            strong = abs(2 * (values[i, j] - low) / (high - low) - 1) > 0.6
            axis.text(
                j,
                i,
                f"{values[i, j]:.2f}",
                ha="center",
                va="center",
                color="#ffffff" if strong else "#111111",
                fontsize=8,
            )
    axis.set_title(title)
    figure.colorbar(image, ax=axis, fraction=0.05)
    return figure


def _fix_layout(figure: Any) -> None:
    """Lay a finished figure out once.

    matplotlib would repeat it for every file, which takes as long as drawing.
    """
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")


def svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element for a page: no XML header, no fixed size, ink in currentColor."""
    _fix_layout(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Ids are unique within a figure only, and a page has many figures: without a prefix one figure's clip
    # path would cut another.
    salt = format(zlib.crc32(text.encode()), "08x")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{salt}-\1"', text)
    text = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\g<1>{salt}-", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"([^>]*?) '
        r'width="[^"]*"',
        r"\1\2\3",
        text,
        count=1,
    )


def save(figure: Any, folder: Path, name: str) -> None:
    """Write NAME.svg and NAME.png on white into a folder, ink in black. Raises UserError on a full disk."""
    _fix_layout(figure)
    for ending in ("svg", "png"):
        options: dict[str, Any] = {"metadata": {"Date": None}} if ending == "svg" else {}
        path = folder / f"{name}.{ending}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, facecolor="white", **options)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
