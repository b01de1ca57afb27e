"""Formats the log line of a step: aligned columns; metrics that were not logged are left out."""

from __future__ import annotations

from dataclasses import dataclass

from rlinf_lite import readable
from rlinf_lite.observability.sinks import Metrics


@dataclass(frozen=True, slots=True)
class Column:
    label: str
    key: str
    width: int
    format: str


COLUMNS = (
    Column("reward", "reward/mean", 6, ".3f"),
    Column("loss", "loss/policy", 8, ".4f"),
    Column("len", "length/response_mean", 6, ".1f"),
    Column("kl", "policy/kl", 6, ".3f"),
    Column("gap", "policy/rollout_logprob_gap", 6, ".4f"),
    Column("ent", "policy/entropy", 6, ".3f"),
    Column("clip", "policy/clip_fraction", 6, ".1%"),
    Column("gnorm", "optim/grad_norm", 6, ".2f"),
    Column("lr", "optim/lr", 7, ".1e"),
)
_PHASE = "time/"
_NO_PHASES = ("time/step", "time/save_stall", "time/save_durable")  # a save has its own line


def step_line(step: int, metrics: Metrics, num_steps: int | None = None) -> str:
    """``step   12/60  reward  0.412 ... | sync  0.01 rollout  0.08 s |  5.2k tok/s  val 0.91``."""
    parts = [_head(step, num_steps), *_columns(metrics)]
    sections = ["  ".join(parts), _phases(metrics), _throughput(metrics)]
    return " | ".join(section for section in sections if section)


def _head(step: int, num_steps: int | None) -> str:
    return f"step {step:4d}" if num_steps is None else f"step {step:{max(4, len(str(num_steps)))}d}/{num_steps}"


def _columns(metrics: Metrics) -> list[str]:
    present = [column for column in COLUMNS if column.key in metrics]
    return [f"{column.label} {_fit(metrics[column.key], column.width, column.format)}" for column in present]


def _phases(metrics: Metrics) -> str:
    phases = {key: value for key, value in metrics.items() if key.startswith(_PHASE) and key not in _NO_PHASES}
    shown = [f"{key.removeprefix(_PHASE)} {_fit(seconds, 5, '.2f')}" for key, seconds in phases.items()]
    return f"{' '.join(shown)} s" if shown else ""


def _throughput(metrics: Metrics) -> str:
    shown = []
    if "throughput/tokens_per_second" in metrics:
        shown.append(f"{readable.count(metrics['throughput/tokens_per_second']):>5} tok/s")
    if "val/accuracy" in metrics:
        shown.append(f"val {metrics['val/accuracy']:.3f}")
    for label, key in (("ungraded", "reward/ungraded"), ("val ungraded", "val/reward/ungraded")):
        if metrics.get(key):
            shown.append(f"{label} {metrics[key]:.0f}")
    return "  ".join(shown)


def _fit(value: float, width: int, spec: str) -> str:
    """``value`` in ``width`` characters: with fewer decimals if it is too large, or as a power of ten."""
    fewer = [f".{decimals}f" for decimals in range(int(spec[1]) - 1, -1, -1)] if spec.endswith("f") else []
    texts = [format(value, each) for each in (spec, *fewer, ".0e")]
    return next((text for text in texts if len(text) <= width), texts[-1]).rjust(width)
