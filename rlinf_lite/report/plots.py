"""Turns figures into Plotly specifications (data and layout), which plotly.js draws in the browser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlinf_lite.report.curves import Curve
from rlinf_lite.report.figures import Bars, Figure
from rlinf_lite.report.run import Mark, Run

PALETTE = ("#2f86c9", "#e07b1f", "#1f9d83", "#b463a4", "#62b5e5", "#c29a17", "#7c8793", "#a84b3c")
_RESTART, _SAVED = "#d4502b", "#1f9d83"
_FORMATS = {"number": ".4~g", "percent": ".1%", "seconds": ".3~s"}
_SIGNIFICANT = 6
_LAYOUT = {
    "margin": {"l": 52, "r": 10, "t": 6, "b": 26},
    "height": 210,
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"size": 11, "color": "#808891"},
    "hovermode": "x unified",
    "hoverlabel": {"bgcolor": "#20252a", "font": {"color": "#f2f4f6"}},
    "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#808891", "activecolor": "#2f86c9"},
    "bargap": 0,
    "barmode": "stack",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The x axis that all charts of a page share, with its marks."""

    first: float
    last: float
    restarts: Sequence[Mark] = ()
    checkpoints: Sequence[Mark] = ()

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Axis | None:
        """The axis of ``runs``, from half a step before their first to half a step after their last.

        None if no run has a step. Restarts and checkpoints are those of the first run.
        """
        ends = [float(end) for run in runs if len(run.steps) for end in (run.steps[0], run.steps[-1])]
        if not ends:
            return None
        run = runs[0]
        saved = sorted({save.step for save in run.saves} | set(run.kept))
        checkpoints = [Mark(step=step, text=f"global_step_{step}") for step in saved if step <= run.last_step]
        return cls(first=min(ends) - 0.5, last=max(ends) + 0.5, restarts=run.restarts, checkpoints=checkpoints)


def plot(figure: Figure | Bars, axis: Axis) -> dict[str, Any]:
    """The ``{"data": ..., "layout": ...}`` of a figure for ``Plotly.newPlot``."""
    kind = "seconds" if isinstance(figure, Bars) else figure.kind
    traces = _bars(figure) if isinstance(figure, Bars) else [t for c in figure.curves for t in _curve(c, figure)]
    grid = {"gridcolor": "rgba(128,136,145,0.22)", "zerolinecolor": "rgba(128,136,145,0.45)"}
    spike = {
        "showspikes": True,
        "spikemode": "across",
        "spikethickness": 1,
        "spikedash": "solid",
        "spikecolor": "#808891",
    }
    log = isinstance(figure, Figure) and figure.log
    y = {"type": "log", "dtick": "D2"} if log else {"nticks": 5}
    layout = _LAYOUT | {
        "showlegend": isinstance(figure, Figure) and len(figure.curves) > 1,
        "xaxis": {
            "range": [axis.first, axis.last],
            "showgrid": False,
            "hoverformat": "d",
            "unifiedhovertitle": {"text": "step %{x}"},
        }
        | spike,
        "yaxis": y | grid | {"hoverformat": _FORMATS[kind], "tickformat": "~%" if kind == "percent" else "~g"},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "shapes": [_restart_line(mark) for mark in axis.restarts],
    }
    return {"data": [*traces, *_marks(axis)], "layout": layout}


def _curve(curve: Curve, figure: Figure) -> Iterable[dict[str, Any]]:
    """The values, and their moving average if there is one. Hovering shows the values."""
    colour, name = PALETTE[curve.colour % len(PALETTE)], curve.label or figure.title
    line = {"color": colour, "width": 1.8}
    x, y = _numbers(curve.points)
    values = {"x": x, "y": y, "name": name, "legendgroup": name, "type": "scatter"}
    if curve.smooth is None:
        yield values | {"mode": "lines+markers" if figure.dots else "lines", "line": line, "marker": {"size": 5}}
        return
    yield values | {"mode": "markers", "marker": {"size": 3, "color": colour, "opacity": 0.4}, "showlegend": False}
    x, y = _numbers(curve.smooth)
    yield values | {"x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip"}


def _bars(bars: Bars) -> list[dict[str, Any]]:
    return [
        {
            "type": "bar",
            "name": name,
            "width": bars.width,
            "marker": {"color": PALETTE[index % len(PALETTE)], "line": {"width": 0}},
        }
        | dict(zip(("x", "y"), _numbers((bars.steps, values)), strict=True))
        for index, (name, values) in enumerate(bars.phases.items())
    ]


def _marks(axis: Axis) -> Iterable[dict[str, Any]]:
    """Triangles for checkpoints, and a dot to point at on the line of each restart."""
    kinds = (
        (axis.checkpoints, 0.0, 0.02, {"symbol": "triangle-up", "size": 7, "color": _SAVED}),
        (axis.restarts, 0.5, 0.98, {"symbol": "circle", "size": 6, "color": _RESTART}),
    )
    for marks, right, height, marker in kinds:
        if marks:
            texts = [mark.text if len(mark.text) <= 120 else f"{mark.text[:120]} ..." for mark in marks]
            yield {
                "type": "scatter",
                "mode": "markers",
                "x": [mark.step + right for mark in marks],
                "y": [height] * len(marks),
                "yaxis": "y2",
                "marker": marker,
                "text": [_plain(text) for text in texts],
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": False,
                "cliponaxis": False,
            }


def _restart_line(mark: Mark) -> dict[str, Any]:
    x = mark.step + 0.5
    line = {"color": _RESTART, "width": 1.2, "dash": "dash"}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _plain(text: str) -> str:
    """Escape ``text``, because plotly.js interprets some HTML tags in texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _numbers(column: tuple[np.ndarray, np.ndarray]) -> tuple[list[float], list[float]]:
    """As JSON values with few digits: a page may hold 2,000 points in each of 40 charts."""
    steps, values = column
    return [round(float(step), 2) for step in steps], [float(f"{value:.{_SIGNIFICANT}g}") for value in values]
