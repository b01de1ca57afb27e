"""Chooses the charts of a report and their curves. `plots` turns them into Plotly specifications."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlinf_lite.report.curves import Curve, make_curve
from rlinf_lite.report.run import Column, Run

_MOST_BARS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart that a run may have, with one curve per metric that was logged."""

    title: str
    metrics: Mapping[str, str]
    """Metric -> label of its curve."""
    about: str
    """A line below the title."""
    kind: str = "number"
    """``number``, ``percent`` or ``seconds``."""
    smooth: bool = True
    dots: bool = False
    """Whether to mark each point, for metrics with few points."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart to draw, with its curves."""

    title: str
    about: str
    kind: str
    dots: bool
    curves: Sequence[Curve]
    log: bool = False
    """Whether the y axis is logarithmic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Stacked bars of seconds by phase: one bar per step, or the mean of several steps."""

    title: str
    steps: np.ndarray
    """The middle of each bar."""
    width: float
    """In steps."""
    phases: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A section of the page."""

    title: str
    figures: Sequence[Figure]
    constant: Mapping[str, float] = field(default_factory=dict)
    """Metrics that had the same value in every step, which need no chart."""


LEARNING = (
    Chart(title="Reward", metrics={"reward/mean": ""}, about="mean over the step's responses"),
    Chart(
        title="Validation accuracy",
        metrics={"val/accuracy": ""},
        about="fraction of validation problems answered correctly",
        kind="percent",
        smooth=False,
        dots=True,
    ),
    Chart(
        title="Training accuracy",
        metrics={"reward/accuracy": ""},
        about="fraction of correct responses",
        kind="percent",
    ),
    Chart(title="Response length", metrics={"length/response_mean": ""}, about="tokens, mean over the responses"),
    Chart(
        title="Truncated responses",
        metrics={"length/cut_fraction": ""},
        about="fraction that reached the token limit",
        kind="percent",
    ),
)
OPTIMISATION = (
    Chart(
        title="Loss",
        metrics={"loss/total": "total", "loss/policy": "policy", "loss/kl": "KL term"},
        about="mean over the step's mini-batches",
    ),
    Chart(
        title="KL divergence",
        metrics={"policy/kl": "to the reference", "policy/update_kl": "of the update"},
        about="nats per token",
    ),
    Chart(title="Gradient norm", metrics={"optim/grad_norm": ""}, about="before clipping"),
    Chart(
        title="Clip fraction",
        metrics={"policy/clip_fraction": "clipped", "policy/dual_clip_fraction": "dual-clipped"},
        about="fraction of tokens outside the trust region",
        kind="percent",
    ),
    Chart(title="Entropy", metrics={"policy/entropy": ""}, about="nats per token"),
    Chart(title="Learning rate", metrics={"optim/lr": ""}, about="after the step", smooth=False),
    Chart(
        title="Rollout gap",
        metrics={"policy/rollout_logprob_gap": ""},
        about="log-probs of engine and trainer: mean difference per token",
    ),
)
SYSTEM = (
    Chart(
        title="Throughput", metrics={"throughput/tokens_per_second": ""}, about="tokens per second, prompts included"
    ),
    Chart(
        title="Memory",
        metrics={"memory/actor_gb": "largest actor", "memory/driver_gb": "driver"},
        about="GB",
        smooth=False,
    ),
)
_ELSEWHERE = ("step", "progress/", "time/", "save/")


def groups(runs: Sequence[Run]) -> list[Group]:
    """The sections of the page: the charts of the first run, with the curves of the others in them."""
    named = [_group(title, charts, runs) for title, charts in (("Learning", LEARNING), ("Optimisation", OPTIMISATION))]
    return [*named, _group("System", SYSTEM, runs), _group("Further metrics", _further(runs[0]), runs)]


def _further(run: Run) -> list[Chart]:
    """One chart per metric that no other chart shows."""
    shown = {metric for chart in (*LEARNING, *OPTIMISATION, *SYSTEM) for metric in chart.metrics}
    keys = [key for key in run.columns if key not in shown and not key.startswith(_ELSEWHERE)]
    return [Chart(title=key, metrics={key: ""}, about="", dots=key.startswith("val/")) for key in keys]


def _group(title: str, charts: Sequence[Chart], runs: Sequence[Run]) -> Group:
    figures: list[Figure] = []
    constant: dict[str, float] = {}
    for chart in charts:
        logged = {key: label for key, label in chart.metrics.items() if key in runs[0].columns}
        flat = {key: value for key in logged if (value := _constant(runs, key)) is not None}
        moving = _different(runs[0], {key: label for key, label in logged.items() if key not in flat})
        constant |= flat
        if curves := list(_curves(chart, moving, runs)):
            kind = {"title": chart.title, "about": chart.about, "kind": chart.kind, "dots": chart.dots}
            figures.append(Figure(**kind, curves=curves))  # type: ignore[arg-type]
    return Group(title=title, figures=figures, constant=constant)


def _constant(runs: Sequence[Run], key: str) -> float | None:
    """The value of a metric if it was the same in all steps of all runs, and there are at least two."""
    values = np.concatenate([run.column(key)[1] for run in runs])
    return float(values[0]) if len(values) > 1 and np.isfinite(values[0]) and (values == values[0]).all() else None


def _different(run: Run, metrics: Mapping[str, str]) -> dict[str, str]:
    """``metrics`` without those that equal an earlier one; training accuracy often equals the reward."""
    kept: dict[str, str] = {}
    for key, label in metrics.items():
        earlier = [*kept, *({"reward/accuracy": ["reward/mean"]}.get(key, []))]
        if not any(np.array_equal(run.column(key)[1], run.column(other)[1], equal_nan=True) for other in earlier):
            kept[key] = label
    return kept


def _curves(chart: Chart, metrics: Mapping[str, str], runs: Sequence[Run]) -> Iterator[Curve]:
    """The curves of a chart: one per metric of a single run, or one per run of the first metric."""
    if len(runs) == 1:
        wanted = [(runs[0].column(key), label, colour) for colour, (key, label) in enumerate(metrics.items())]
    else:
        wanted = [(run.column(key), run.name, colour) for key in [*metrics][:1] for colour, run in enumerate(runs)]
    for column, label, colour in wanted:
        curve = make_curve(column, label=label, colour=colour, smooth=chart.smooth)
        if curve is not None:
            yield curve


def phase_bars(run: Run) -> Bars | None:
    """Seconds by phase and step; None if no phases were logged."""
    if not run.phases or "time/step" not in run.columns:
        return None
    steps = run.steps
    number = min(len(steps), _MOST_BARS)
    edges = np.linspace(0, len(steps), number + 1).round().astype(int)[:-1]
    counts = np.diff([*edges, len(steps)])
    phases = {name: np.add.reduceat(_aligned(steps, column), edges) / counts for name, column in run.phases.items()}
    whole = np.add.reduceat(_aligned(steps, run.columns["time/step"]), edges) / counts
    phases["other"] = np.maximum(whole - sum(phases.values()), 0.0)
    width = (steps[-1] - steps[0] + 1) / number
    middles = steps[0] - 0.5 + width * (np.arange(number) + 0.5)
    return Bars(title="Time by phase", steps=middles, width=width, phases=phases)


def _aligned(steps: np.ndarray, column: Column) -> np.ndarray:
    """float64 [steps]: the value at each step, 0 if there is none."""
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, column[0])] = np.nan_to_num(column[1], posinf=0.0, neginf=0.0)
    return values


def save_figures(run: Run) -> list[Figure]:
    """The charts of the cost of saves, by the step at which each began."""
    saves = run.saves
    if len(saves) < 2:
        return []
    steps = np.array([save.step for save in saves], np.int64)
    order = np.argsort(steps, kind="stable")

    def curves(label: str, colour: int, values: list[float]) -> list[Curve]:
        curve = make_curve((steps[order], np.array(values)[order]), label=label, colour=colour, smooth=False)
        return [] if curve is None else [curve]

    durable = curves("durable", 0, [max(save.durable_seconds, 1e-4) for save in saves])
    held = curves("held", 1, [max(save.stall_seconds, 1e-4) for save in saves])
    speed = curves("", 0, [save.gb_per_second for save in saves])
    texts = {"about": "until it was on disk, and how long the training waited", "kind": "seconds", "dots": True}
    return [
        Figure(title="Seconds per save", curves=durable + held, log=True, **texts),  # type: ignore[arg-type]
        Figure(title="Save speed", about="GB/s", kind="number", dots=True, curves=speed),
    ]
