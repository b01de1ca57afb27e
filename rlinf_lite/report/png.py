"""The charts as PNG files, by matplotlib, for documents and slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf_lite.report.figures import Bars, Figure, groups, phase_bars, save_figures
from rlinf_lite.report.page import axis_of
from rlinf_lite.report.run import Run
from rlinf_lite.report.svg import Axis

_COLOURS = ("#0069a8", "#d0660a", "#00836a", "#a3518f", "#3a9fd8", "#b58400", "#6b7480", "#8c3b2e")
_INK, _SOFT, _LINE = "#1d2125", "#636b74", "#e0e3e6"
_RESTART, _SAVED = "#c8431f", "#00836a"
_STYLE: Any = {
    "font.size": 9,
    "axes.edgecolor": "#b9c0c7",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
}


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One file a chart, and ``overview.png``, the first six together.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    axis, written = axis_of(runs), []
    if axis is None:
        return []
    drawn = list(_drawn(runs))

    def saved(name: str, canvas: Any) -> Path:
        FigureCanvasAgg(canvas)
        canvas.savefig(folder / f"{name}.png", dpi=150)
        return folder / f"{name}.png"

    with matplotlib.rc_context(_STYLE):
        for slug, figure in drawn:
            canvas = Canvas(figsize=(6.4, 3.2), layout="constrained")
            _draw(canvas.add_subplot(), figure, axis)
            written.append(saved(slug, canvas))
        canvas = Canvas(figsize=(13.5, 6.4), layout="constrained")
        for place, (_, figure) in enumerate(drawn[:6]):
            _draw(canvas.add_subplot(2, 3, place + 1), figure, axis)
        written.append(saved("overview", canvas))
    return written


def _drawn(runs: Sequence[Run]) -> Iterator[tuple[str, Figure | Bars]]:
    *shown, _ = groups(runs)
    figures = [figure for group in shown for figure in group.figures]
    bars = phase_bars(runs[0])
    first = [(figure.slug, figure) for figure in figures[:5]]
    yield from first
    if bars is not None:
        yield "time_by_phase", bars
    yield from ((figure.slug, figure) for figure in [*figures[5:], *save_figures(runs[0])])


def _draw(ax: Any, figure: Figure | Bars, axis: Axis) -> None:
    if isinstance(figure, Bars):
        _draw_bars(ax, figure)
    else:
        _draw_curves(ax, figure)
    ax.set_title(figure.title)
    ax.set_xlim(axis.first, axis.last)
    ax.set_xlabel("step")
    for mark in axis.restarts:
        ax.axvline(mark.step + 0.5, color=_RESTART, linewidth=1, linestyle=(0, (4, 3)))
    steps = [mark.step for mark in axis.checkpoints]
    if steps:  # without points the layout takes the markers to stand in the corner of the canvas
        base = ax.get_xaxis_transform()
        ax.plot(steps, np.full(len(steps), 0.015), "^", color=_SAVED, markersize=4, transform=base, clip_on=False)


def _draw_curves(ax: Any, figure: Figure) -> None:
    from matplotlib.ticker import PercentFormatter

    for curve in figure.curves:
        colour, label = _COLOURS[curve.colour % 8], curve.label or None
        if curve.smooth is not None:
            ax.plot(*curve.points, ".", color=colour, alpha=0.3, markersize=3)
            ax.plot(*curve.smooth, color=colour, linewidth=1.6, label=label)
        else:
            marker = "o" if figure.dots else None
            ax.plot(*curve.points, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    if figure.log:
        ax.set_yscale("log")
    if figure.kind == "percent":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(figure.curves) > 1:
        ax.legend().set_in_layout(False)


def _draw_bars(ax: Any, bars: Bars) -> None:
    below = np.zeros(len(bars.steps))
    for index, (name, values) in enumerate(bars.phases.items()):
        ax.bar(bars.steps, values, bars.width, bottom=below, color=_COLOURS[index % 8], label=name)
        below = below + values
    ax.set_ylabel("seconds")
    ax.set_ylim(0, 1.3 * below.max() or 1.0)
    ax.legend(ncols=4, fontsize=7.5, loc="upper right", columnspacing=1.0, handlelength=1.2).set_in_layout(False)
