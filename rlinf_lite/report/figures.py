"""Which charts a report has, and what is in each: drawn by `plots`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlinf_lite.report.curves import Curve, curve
from rlinf_lite.report.run import Column, Run

_MOST_BARS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart that a run may have: one curve per logged metric."""

    title: str
    metrics: Mapping[str, str]
    """Metric -> label."""
    about: str
    kind: str = "number"
    smooth: bool = True
    dots: bool = False
    """Few points: each is marked, and they are joined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart with its curves."""

    title: str
    about: str
    kind: str
    dots: bool
    curves: Sequence[Curve]
    log: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """Seconds by phase, stacked: one bar per step, or the mean of several."""

    title: str
    steps: np.ndarray
    """Middle of each bar."""
    width: float
    """In steps."""
    phases: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    title: str
    figures: Sequence[Figure]
    constant: Mapping[str, float] = field(default_factory=dict)
    """Metrics that had one value throughout, which needs no chart."""


LEARNING = (
    Chart(title="Reward", metrics={"reward/mean": ""}, about="mean over the step's responses"),
    Chart(
        title="Validation accuracy",
        metrics={"val/accuracy": ""},
        about="share of validation problems answered correctly",
        kind="percent",
        smooth=False,
        dots=True,
    ),
    Chart(
        title="Training accuracy", metrics={"reward/accuracy": ""}, about="share of correct responses", kind="percent"
    ),
    Chart(title="Response length", metrics={"length/response_mean": ""}, about="tokens, mean over the responses"),
    Chart(
        title="Truncated responses",
        metrics={"length/cut_fraction": ""},
        about="share that reached the token limit",
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
        about="share of tokens outside of the trust region",
        kind="percent",
    ),
    Chart(title="Entropy", metrics={"policy/entropy": ""}, about="nats per token"),
    Chart(title="Learning rate", metrics={"optim/lr": ""}, about="after the step", smooth=False),
    Chart(
        title="Rollout gap",
        metrics={"policy/rollout_logprob_gap": ""},
        about="log-probs: engine against trainer, mean per token",
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
    """The charts of the first run, the others' curves laid over them."""
    named = [_group(title, charts, runs) for title, charts in (("Learning", LEARNING), ("Optimisation", OPTIMISATION))]
    return [*named, _group("System", SYSTEM, runs), _group("Further metrics", _others(runs[0]), runs)]


def _others(run: Run) -> list[Chart]:
    """One chart for each metric that no other shows."""
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
    """The one value that a metric had in all steps of all runs, if there were two or more."""
    values = np.concatenate([run.column(key)[1] for run in runs])
    return float(values[0]) if len(values) > 1 and np.isfinite(values[0]) and (values == values[0]).all() else None


def _different(run: Run, metrics: Mapping[str, str]) -> dict[str, str]:
    """Without those that repeat an earlier one; training accuracy often repeats the reward."""
    kept: dict[str, str] = {}
    for key, label in metrics.items():
        earlier = [*kept, *({"reward/accuracy": ["reward/mean"]}.get(key, []))]
        if not any(np.array_equal(run.column(key)[1], run.column(other)[1], equal_nan=True) for other in earlier):
            kept[key] = label
    return kept


def _curves(chart: Chart, metrics: Mapping[str, str], runs: Sequence[Run]) -> Iterator[Curve]:
    """One run: one colour per metric. Several runs: the first metric, one colour per run."""
    if len(runs) == 1:
        wanted = [(runs[0].column(key), label, colour) for colour, (key, label) in enumerate(metrics.items())]
    else:
        wanted = [(run.column(key), run.name, colour) for key in [*metrics][:1] for colour, run in enumerate(runs)]
    for column, label, colour in wanted:
        made = curve(column, label=label, colour=colour, smooth=chart.smooth)
        if made is not None:
            yield made


def phase_bars(run: Run) -> Bars | None:
    """None: no step told its phases."""
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
    """A value for each of ``steps``, 0 where there is none."""
    values = np.zeros(len(steps))
    values[np.searchsorted(steps, column[0])] = np.nan_to_num(column[1], posinf=0.0, neginf=0.0)
    return values


def save_figures(run: Run) -> list[Figure]:
    """What saves cost, over the steps at which they were begun."""
    saves = run.saves
    if len(saves) < 2:
        return []
    steps = np.array([save.step for save in saves], np.int64)
    order = np.argsort(steps, kind="stable")

    def made(label: str, colour: int, values: list[float]) -> list[Curve]:
        column = steps[order], np.array(values)[order]
        found = curve(column, label=label, colour=colour, smooth=False)
        return [] if found is None else [found]

    durable = made("durable", 0, [max(save.durable_seconds, 1e-4) for save in saves])
    held = made("held", 1, [max(save.stall_seconds, 1e-4) for save in saves])
    speed = made("", 0, [save.gb_per_second for save in saves])
    texts = {"about": "until it was on the disk, and how long the step loop waited", "kind": "seconds", "dots": True}
    return [
        Figure(title="Seconds per save", curves=durable + held, log=True, **texts),  # type: ignore[arg-type]
        Figure(title="Save speed", about="GB/s", kind="number", dots=True, curves=speed),
    ]
