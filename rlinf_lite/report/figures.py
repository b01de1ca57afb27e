"""Chooses the charts of a report and turns them into Plotly specifications, which plotly.js draws in the browser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from rlinf_lite.report.run import Column, Run

PALETTE = ("#2f86c9", "#e07b1f", "#1f9d83", "#b463a4", "#62b5e5", "#c29a17", "#7c8793", "#a84b3c")
_MOST_POINTS = 1000
"""Of one curve: a chart is about 400 pixels wide."""
_SMOOTH_FROM = 20
_SMOOTH_POINTS = 400
_MOST_BARS = 160


class Chart(NamedTuple):
    """A chart that a run may have."""

    title: str
    about: str
    metrics: Mapping[str, str]
    """Metric -> label of its curve."""
    kind: str = "number"
    """``number``, ``percent`` or ``duration``: how the page writes its values."""


class Figure(NamedTuple):
    """A chart to draw."""

    chart: Chart
    last: float | None
    """The last value of its only curve; None if it has more."""
    data: Sequence[Mapping[str, Any]]
    """Plotly traces."""
    layout: Mapping[str, Any]


class Section(NamedTuple):
    figures: Sequence[Figure]
    constant: Mapping[str, float]
    """Metrics that had the same value in every step, which need no chart."""


SECTIONS = {
    "Learning": (
        Chart("Reward", "mean over the step's responses", {"reward/mean": ""}),
        Chart("Validation accuracy", "validation problems answered correctly", {"val/accuracy": ""}, kind="percent"),
        Chart("Training accuracy", "fraction of correct responses", {"reward/accuracy": ""}, kind="percent"),
        Chart("Response length", "tokens, mean over the responses", {"length/response_mean": ""}),
        Chart("Truncated responses", "reached the token limit", {"length/cut_fraction": ""}, kind="percent"),
    ),
    "Optimisation": (
        Chart(
            "Loss",
            "mean over the step's mini-batches",
            {"loss/total": "total", "loss/policy": "policy", "loss/kl": "KL term"},
        ),
        Chart(
            "KL divergence", "nats per token", {"policy/kl": "to the reference", "policy/update_kl": "of the update"}
        ),
        Chart("Gradient norm", "before clipping", {"optim/grad_norm": ""}),
        Chart(
            "Clip fraction",
            "tokens outside the trust region",
            {"policy/clip_fraction": "clipped", "policy/dual_clip_fraction": "dual-clipped"},
            kind="percent",
        ),
        Chart("Entropy", "nats per token", {"policy/entropy": ""}),
        Chart("Learning rate", "after the step", {"optim/lr": ""}),
        Chart("Rollout gap", "log-probs of engine and trainer: mean difference", {"policy/rollout_logprob_gap": ""}),
    ),
    "Time and memory": (
        Chart("Throughput", "tokens per second, prompts included", {"throughput/tokens_per_second": ""}),
        Chart("Memory", "GB", {"memory/actor_gb": "largest actor", "memory/driver_gb": "driver"}),
    ),
}
FURTHER = "Further metrics"
_ELSEWHERE = ("step", "progress/", "time/", "save/")


def sections(runs: Sequence[Run]) -> dict[str, Section]:
    """The sections of the page by title: the charts of the first run, with the curves of the others in them."""
    shown = {metric for charts in SECTIONS.values() for chart in charts for metric in chart.metrics}
    further = [key for key in runs[0].columns if key not in shown and not key.startswith(_ELSEWHERE)]
    all_charts = SECTIONS | {FURTHER: tuple(Chart(key, "", {key: ""}) for key in further)}
    return {title: _section(charts, runs) for title, charts in all_charts.items()}


def _section(charts: Sequence[Chart], runs: Sequence[Run]) -> Section:
    figures: list[Figure] = []
    constant: dict[str, float] = {}
    for chart in charts:
        curves: dict[str, Column] = {}
        for key, label in chart.metrics.items():
            columns = {run.label if len(runs) > 1 else label or chart.title: run.column(key) for run in runs}
            values = np.concatenate([column.values for column in columns.values()])
            if len(values) > 1 and (values == values[0]).all():
                constant[key] = float(values[0])
            elif key in runs[0].columns:
                # With several runs, a chart has the curves of its first metric only.
                curves |= {name: each for name, each in columns.items() if len(each.values) and name not in curves}
        if curves:
            figures.append(_figure(chart, curves))
    return Section(figures, constant)


def _figure(chart: Chart, curves: Mapping[str, Column]) -> Figure:
    """A chart with one curve per label."""
    data = [trace for number, (label, column) in enumerate(curves.items()) for trace in _curve(label, column, number)]
    axes = {
        "percent": {"hoverformat": ".1%", "tickformat": "~%"},
        "duration": {"hoverformat": ".3~s", "type": "log", "dtick": "D2"},
    }
    last = float(next(iter(curves.values())).values[-1]) if len(curves) == 1 else None
    return Figure(chart, last, data, {"yaxis": axes.get(chart.kind, {}), "showlegend": len(curves) > 1})


def _curve(label: str, column: Column, number: int) -> Iterator[dict[str, Any]]:
    """A line through few values; dots and their moving average for many. Hovering shows the values."""
    colour = PALETTE[number % len(PALETTE)]
    # plotly.js interprets some HTML tags in names.
    common = {"name": escape(label, quote=False), "legendgroup": label}
    line = {**common, "line": {"color": colour, "width": 1.8}}
    if len(column.values) < _SMOOTH_FROM:
        yield {**_points(column), **line, "mode": "lines+markers", "marker": {"size": 5}}
        return
    dots = {"size": 3, "color": colour, "opacity": 0.4}
    yield {**_points(extremes(column)), **common, "mode": "markers", "marker": dots, "showlegend": False}
    yield {**_points(moving_average(column)), **line, "mode": "lines", "hoverinfo": "skip"}


def extremes(column: Column) -> Column:
    """At most `_MOST_POINTS` points: the lowest and highest value of each bucket, so that no spike is lost."""
    if len(column.values) <= _MOST_POINTS:
        return column
    buckets = np.array_split(np.arange(len(column.values)), _MOST_POINTS // 2)
    ends = [(rows[column.values[rows].argmin()], rows[column.values[rows].argmax()]) for rows in buckets]
    kept = np.unique(ends)
    return Column(column.steps[kept], column.values[kept])


def moving_average(column: Column) -> Column:
    """A centred moving average over a twentieth of the rows, at up to `_SMOOTH_POINTS` points."""
    steps, values = (means(each, _SMOOTH_POINTS) for each in column)
    window = np.ones(max(3, len(values) // 20 | 1))
    return Column(steps, np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same"))


def means(values: np.ndarray, most: int) -> np.ndarray:
    """Means of up to ``most`` buckets of about the same number of rows."""
    return np.array([bucket.mean() for bucket in np.array_split(values, min(len(values), most))])


def _points(column: Column) -> dict[str, list[float]]:
    """As JSON values with few digits: a page may hold 1,000 points in each of 40 charts."""
    return {
        "x": [round(step, 1) for step in column.steps.tolist()],
        "y": [float(f"{value:.6g}") for value in column.values.tolist()],
    }


def phase_seconds(run: Run) -> dict[str, np.ndarray]:
    """Phase -> seconds [number of rows], 0 where it did not run; empty if no phases were logged."""
    elsewhere = ("time/step", "time/save_stall", "time/save_durable")
    phases = {key: _aligned(run, key) for key in run.columns if key.startswith("time/") and key not in elsewhere}
    if phases:
        phases["other"] = np.maximum(_aligned(run, "time/step") - sum(phases.values()), 0.0)
    return {key.removeprefix("time/"): seconds for key, seconds in phases.items()}


def _aligned(run: Run, key: str) -> np.ndarray:
    seconds = np.zeros(len(run.steps))
    seconds[np.searchsorted(run.steps, run.column(key).steps)] = run.column(key).values
    return seconds


def phase_figure(run: Run, phases: Mapping[str, np.ndarray]) -> Figure:
    """Stacked bars of seconds by phase: one bar per step, or the mean of several steps."""
    steps = means(run.steps, _MOST_BARS)
    bar = {"type": "bar", "width": (run.last_step - int(run.steps[0]) + 1) / len(steps)}
    data = [
        _points(Column(steps, means(seconds, _MOST_BARS)))
        | {**bar, "name": name, "marker": {"color": PALETTE[index % len(PALETTE)]}}
        for index, (name, seconds) in enumerate(phases.items())
    ]
    chart = Chart("Time by phase", "seconds per step; colours as in the table", {})
    layout = {"barmode": "stack", "bargap": 0, "showlegend": False, "yaxis": {"hoverformat": ".3~s"}}
    return Figure(chart, None, data, layout)


def save_figure(run: Run) -> Figure:
    """How long each save took and held the training, by step. The run has at least one save."""
    steps = np.array([save.step for save in run.saves])
    curves = {
        label: Column(steps, np.array([max(save.figures.get(key, 0.0), 1e-4) for save in run.saves]))
        for label, key in (("durable", "time/save_durable"), ("held", "time/save_stall"))
    }
    about = "until it was on disk, and how long the training waited"
    return _figure(Chart("Seconds per save", about, {}, kind="duration"), curves)


def marks(runs: Sequence[Run]) -> dict[str, Any]:
    """What all charts of a page have in common: the range of their x axis, and the first run's restarts and saves."""
    ends = [step for run in runs if len(run.steps) for step in (int(run.steps[0]), run.last_step)]
    saved = {*runs[0].kept, *(save.step for save in runs[0].saves)}
    return {
        "range": [min(ends) - 0.5, max(ends) + 0.5] if ends else None,
        "restarts": [event.step + 0.5 for event in runs[0].restarts],
        "checkpoints": sorted(step for step in saved if step <= runs[0].last_step),
    }
