"""Charts as inline SVG. Colours and type are the page's (CSS); what `page.js` needs to read values out goes along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rlinf_lite.report.curves import Curve
from rlinf_lite.report.figures import Bars, Figure
from rlinf_lite.report.html import text as as_text
from rlinf_lite.report.numbers import log_ticks, tick_label, ticks
from rlinf_lite.report.run import Column, Mark

WIDTH, HEIGHT = 440, 196
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 26
_TICKS_X, _TICKS_Y = 5, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The steps that all charts of a page share, and what is marked on them."""

    first: float
    last: float
    restarts: Sequence[Mark] = ()
    checkpoints: Sequence[Mark] = ()

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / (self.last - self.first)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    low: float
    high: float
    log: bool = False

    def y(self, value: float) -> float:
        change: Callable[[float], float] = math.log10 if self.log else float
        low, high = change(self.low), change(self.high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - change(value)) / (high - low)

    @property
    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, _TICKS_Y)


def axis_for(steps: Iterable[np.ndarray], restarts: Sequence[Mark], checkpoints: Sequence[Mark]) -> Axis:
    """From half a step before the first to half a step after the last."""
    ends = [float(end) for each in steps if len(each) for end in (each[0], each[-1])]
    return Axis(first=min(ends) - 0.5, last=max(ends) + 0.5, restarts=restarts, checkpoints=checkpoints)


def draw(figure: Figure, axis: Axis) -> tuple[str, dict[str, Any]]:
    """The ``<svg>``, and the data of its read-out."""
    scale = _scale(figure)
    parts = [_grid(scale, figure.kind), _steps(axis), _marks(axis)]
    for curve in figure.curves:
        parts += _curve(curve, axis, scale, joined=figure.dots)
    return _svg(figure.title, parts), {
        "x": [axis.first, axis.last, LEFT, WIDTH - RIGHT],
        "y": [scale.low, scale.high, HEIGHT - BOTTOM, TOP, int(scale.log)],
        "kind": figure.kind,
        "curves": [_readout(curve.label, curve.colour, curve.means) for curve in figure.curves],
    }


def draw_bars(bars: Bars, axis: Axis) -> tuple[str, dict[str, Any]]:
    """As `draw`, stacked."""
    total = np.sum([*bars.phases.values()], axis=0)
    scale = _Scale(low=0.0, high=_above(float(np.percentile(total, 99)), float(total.max())))
    parts, below = [_grid(scale, "seconds"), _steps(axis)], np.zeros(len(total))
    for colour, values in enumerate(bars.phases.values()):
        parts.append(_stack(bars, axis, scale, below, below + values, colour))
        below = below + values
    return _svg(bars.title, [*parts, _marks(axis)]), {
        "x": [axis.first, axis.last, LEFT, WIDTH - RIGHT],
        "kind": "seconds",
        "curves": [_readout(name, i, (bars.steps, values)) for i, (name, values) in enumerate(bars.phases.items())],
    }


def _above(usual: float, highest: float) -> float:
    """The top of the bars: the highest, unless it would flatten all others; what is cut off runs out of the chart."""
    return (highest if highest <= 3 * usual else 1.5 * usual) * 1.05 or 1.0


def _scale(figure: Figure) -> _Scale:
    low = min(float(curve.points[1].min()) for curve in figure.curves)
    high = max(float(curve.points[1].max()) for curve in figure.curves)
    if figure.log:
        return _Scale(low=low / 1.5, high=high * 1.5, log=True)
    if low == high:
        pad = abs(low) * 0.1 or 0.5
        return _Scale(low=low - pad, high=high + pad)
    pad = 0.06 * (high - low)
    keeps_zero = 0 <= low <= pad  # no room below zero for what is never negative
    return _Scale(low=0.0 if keeps_zero else low - pad, high=high + pad)


def _svg(title: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    box = f"0 0 {WIDTH} {HEIGHT}"
    return (
        f'<svg viewBox="{box}" role="img" aria-label="{as_text(title)}" data-chart>{body}<g class="cursor"></g></svg>'
    )


def _grid(scale: _Scale, kind: str) -> str:
    values = scale.ticks
    spacing = min((b - a for a, b in pairwise(values)), default=abs(values[0]) if values else 1.0)
    lines, labels = [], []
    for value in values:
        y = scale.y(value)
        lines.append(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
        # On a logarithmic axis each label has the digits that it needs itself.
        text = tick_label(value, value if scale.log else spacing or 1.0, kind)
        labels.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" class="left">{as_text(text)}</text>')
    return f'<path class="grid" d="{"".join(lines)}"/>{"".join(labels)}'


def _steps(axis: Axis) -> str:
    base = HEIGHT - BOTTOM
    whole = [value for value in ticks(axis.first, axis.last, _TICKS_X) if value == round(value)]
    values = whole or [round(axis.first + 0.5)]
    lines = "".join(f"M{axis.x(value):.1f} {base}v4" for value in values)
    labels = [f'<text x="{axis.x(v):.1f}" y="{base + 17}">{tick_label(v, 1.0)}</text>' for v in values]
    return f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}{lines}"/>{"".join(labels)}'


def _marks(axis: Axis) -> str:
    base = HEIGHT - BOTTOM
    saves = "".join(f"M{axis.x(mark.step):.1f} {base - 5}l3 5h-6z" for mark in axis.checkpoints)
    restarts = [
        f'<path class="restart" d="M{axis.x(mark.step + 0.5):.1f} {TOP}V{base}">'
        f"<title>{as_text(f'after step {mark.step}: {mark.text}')}</title></path>"
        for mark in axis.restarts
    ]
    return f'<path class="saved" d="{saves}"/>{"".join(restarts)}'


def _curve(curve: Curve, axis: Axis, scale: _Scale, *, joined: bool) -> list[str]:
    colour = f"c{curve.colour % 8}"
    places = [(axis.x(s), scale.y(v)) for s, v in zip(*curve.points, strict=True)]
    if curve.smooth is not None:
        line = [(axis.x(s), scale.y(v)) for s, v in zip(*curve.smooth, strict=True)]
        return [_dots(places, f"dots {colour} {_faint(len(places))}"), _line(line, f"line {colour}")]
    parts = [_line(places, f"line {colour}")]
    if joined or len(places) < 3:
        parts.append(_dots(places, f"dots big {colour}"))
    return parts


def _faint(num_points: int) -> str:
    return "fine" if num_points > 400 else "some"


def _line(places: Sequence[tuple[float, float]], css: str) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>'


def _dots(places: Sequence[tuple[float, float]], css: str) -> str:
    # Lines of no length: with round caps each is a dot.
    return f'<path class="{css}" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'


def _stack(bars: Bars, axis: Axis, scale: _Scale, low: np.ndarray, high: np.ndarray, colour: int) -> str:
    half = bars.width / 2
    gap = min(0.5, 0.1 * (axis.x(bars.width) - axis.x(0)))
    path = []
    for step, bottom, top in zip(bars.steps, low, np.minimum(high, scale.high), strict=True):
        if top > bottom:
            left, right = axis.x(step - half), axis.x(step + half) - gap
            path.append(f"M{left:.2f} {scale.y(bottom):.1f}H{right:.2f}V{scale.y(top):.1f}H{left:.2f}z")
    return f'<path class="bar c{colour % 8}" d="{"".join(path)}"/>'


def _readout(label: str, colour: int, column: Column) -> dict[str, Any]:
    return {
        "label": label,
        "colour": colour % 8,
        "x": [round(float(step), 1) for step in column[0]],
        "y": [float(f"{value:.5g}") for value in column[1]],
    }
