"""Reduces the rows of a metric to a curve: at most 2,000 points, with the extremes kept, and a moving average."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlinf_lite.report.run import Column, drawable

MOST_POINTS = 2000
_SMOOTH_FROM = 20
_SMOOTH_POINTS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    label: str
    colour: int
    """Index into the palette."""
    points: Column
    """As logged, or the lowest and highest value of each bucket."""
    last: float
    """The last finite value."""
    smooth: Column | None
    num_not_finite: int
    """NaN and infinite values, which are not drawn."""


def make_curve(column: Column, *, label: str, colour: int, smooth: bool) -> Curve | None:
    """The curve of a metric, or None if it has no finite value."""
    finite = drawable(column[1])
    steps, values = column[0][finite], column[1][finite]
    if not len(steps):
        return None
    return Curve(
        label=label,
        colour=colour,
        points=extremes(steps, values),
        last=float(values[-1]),
        smooth=smoothed(steps, values) if smooth and len(steps) >= _SMOOTH_FROM else None,
        num_not_finite=int((~finite).sum()),
    )


def extremes(steps: np.ndarray, values: np.ndarray) -> Column:
    """At most `MOST_POINTS` points: the lowest and highest of each bucket, so that no spike is lost."""
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept: list[int] = []
    for first, end in _buckets(len(steps), MOST_POINTS // 2):
        part = values[first:end]
        kept += sorted({first + int(part.argmin()), first + int(part.argmax())})
    return steps[kept], values[kept]


def smoothed(steps: np.ndarray, values: np.ndarray) -> Column:
    """A centred moving average over a twentieth of the rows; the window is narrower at both ends."""
    half, index, last = max(2, len(values) // 40), np.arange(len(values)), len(values) - 1
    # The window shrinks at both ends, so that a steep beginning stays steep, but not to a single row.
    reach = np.clip(np.minimum(index, last - index), max(2, half // 4), half)
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach, last)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    mean = (sums[high + 1] - sums[low]) / (high + 1 - low)
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), _SMOOTH_POINTS)).round().astype(int))
    return steps[kept], mean[kept]


def _buckets(length: int, number: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, length, number + 1).round().astype(int)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
