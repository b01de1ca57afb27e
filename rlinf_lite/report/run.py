"""A run's directory, read: metrics, events, configs, checkpoints. Whatever is missing or torn is left out and told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlinf_lite.errors import UserError
from rlinf_lite.observability import Event, read_events
from rlinf_lite.observability.events import BACK, EVENTS_FILE, RECOVERED, RESTART, RESUME, SAVE, START
from rlinf_lite.observability.hub import METRICS_FILE

Column = tuple[np.ndarray, np.ndarray]
"""(steps int64 [N], values float64 [N]) of one metric, NaN and infinities included."""
_CONFIG = "config.yaml"
_NO_PHASES = ("time/step", "time/save_stall", "time/save_durable")


class ReportError(UserError, ValueError):
    """There is nothing to report; the message says what was looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Something at a step of the axis."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """What one checkpoint cost."""

    step: int
    stall_seconds: float
    durable_seconds: float
    num_bytes: float
    gb_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One start's resolved config."""

    name: str
    """``config.yaml``, or ``config.from_step_60.yaml`` of a resume."""
    values: Mapping[str, Any]
    """By dotted key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    directory: Path
    columns: Mapping[str, Column]
    num_torn: int
    """Lines of ``metrics.jsonl`` that could not be read."""
    events: list[Event]
    configs: list[Config]
    """The first start's, then those of resumes as they came."""
    kept: Mapping[int, int]
    """Checkpoints that are there: step -> bytes."""
    last_row_time: float | None

    @property
    def name(self) -> str:
        return str(self.setting("runner.experiment_name", self.directory.name))

    def setting(self, key: str, default: Any = None) -> Any:
        """As of the last start."""
        return self.configs[-1].values.get(key, default) if self.configs else default

    def column(self, key: str) -> Column:
        empty = (np.empty(0, np.int64), np.empty(0))
        return self.columns.get(key, empty)

    def finite(self, key: str) -> Column:
        """`column` without NaN, infinities, and what comes near them."""
        steps, values = self.column(key)
        kept = drawable(values)
        return steps[kept], values[kept]

    @property
    def steps(self) -> np.ndarray:
        """Of all rows, rising."""
        return self.column("step")[0]

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def phases(self) -> dict[str, Column]:
        """Seconds by phase, as they come within a step."""
        keys = [key for key in self.columns if key.startswith("time/") and key not in _NO_PHASES]
        return {key.removeprefix("time/"): self.columns[key] for key in keys}

    @property
    def start_time(self) -> float | None:
        """Seconds since 1970; of runs without events the time of their first config file."""
        first = self.directory / _CONFIG
        if self.events and self.events[0].kind == START:
            return self.events[0].time
        return first.stat().st_mtime if first.exists() else None

    @property
    def restarts(self) -> list[Mark]:
        """Where the run was resumed or recovered."""
        found = [Mark(step=e.step, text=_restart_text(e)) for e in self.events if e.kind in (RESTART, RESUME)]
        resumes = [(_step_of_config(config.name), config.name) for config in self.configs[1:]]
        return found if self.events else [Mark(step=step, text=name) for step, name in resumes]

    @property
    def recoveries(self) -> list[Event]:
        return [event for event in self.events if event.kind == RECOVERED]

    @property
    def saves(self) -> list[Save]:
        """By event, one per step, without those of a branch that was left. Of runs that recorded none by the rows in
        which they ended, which are a step or more later.
        """
        recorded: dict[int, Save] = {}
        for event in self.events:
            if event.kind in (RESUME, BACK):
                recorded = {step: save for step, save in recorded.items() if step <= event.step}
            elif event.kind == SAVE and event.figures:
                recorded[event.step] = _save(event.step, event.figures)
        return list(recorded.values()) or [
            _save(int(step), self._row(step)) for step in self.column("time/save_durable")[0]
        ]

    def _row(self, step: int) -> dict[str, float]:
        places = {key: np.searchsorted(steps, step) for key, (steps, _) in self.columns.items()}
        return {
            key: float(values[place])
            for key, (steps, values) in self.columns.items()
            if (place := places[key]) < len(steps) and steps[place] == step
        }


def drawable(values: np.ndarray) -> np.ndarray:
    """bool [N]: neither NaN, nor infinite, nor so large that an axis between two of them would be."""
    return np.abs(values) < 1e300


def _save(step: int, figures: Mapping[str, float]) -> Save:
    return Save(
        step=step,
        stall_seconds=figures.get("time/save_stall", 0.0),
        durable_seconds=figures.get("time/save_durable", 0.0),
        num_bytes=figures.get("save/num_bytes", 0.0),
        gb_per_second=figures.get("save/gb_per_second", 0.0),
    )


def _restart_text(event: Event) -> str:
    return f"resumed from {Path(event.text).name}" if event.kind == RESUME else event.text


def read_run(directory: Path) -> Run:
    """
    Raises:
        ReportError: there is no such directory, or it is not a run's; names runs that lie below it.
    """
    if not directory.is_dir():
        raise ReportError(
            f"{directory}: there is no such directory; give that of a run, {{output_dir}}/{{experiment_name}}"
        )
    metrics = directory / METRICS_FILE
    if not metrics.exists() and not (directory / _CONFIG).exists():
        raise ReportError(
            f"{directory}: holds neither {METRICS_FILE} nor {_CONFIG}, so it is no run's{_below(directory)}"
        )
    columns, num_torn = read_columns(metrics)
    configs = [Config(name=path.name, values=dict(_flatten(path))) for path in _config_files(directory)]
    root = configs[-1].values.get("runner.checkpoint.root") if configs else None
    return Run(
        directory=directory,
        columns=columns,
        num_torn=num_torn,
        events=read_events(directory / EVENTS_FILE),
        configs=configs,
        kept=_kept(Path(root or directory / "checkpoints")),
        last_row_time=metrics.stat().st_mtime if metrics.exists() else None,
    )


def _below(directory: Path) -> str:
    runs = sorted(str(path.parent) for path in directory.glob(f"*/{METRICS_FILE}"))
    return f"; did you mean {' or '.join(runs[:3])}?" if runs else "; give {output_dir}/{experiment_name}"


def read_columns(path: Path) -> tuple[dict[str, Column], int]:
    """Every metric of ``metrics.jsonl`` (``step`` is one of them), and how many lines are no rows."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    num_torn, last = 0, -1
    with path.open("rb") if path.exists() else _nothing() as lines:
        for line in lines:
            row = _row(line)
            if row is None or row["step"] <= last:
                num_torn += 1
                continue
            last = row["step"]
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(last)
                    values.append(value)
    return {key: (np.array(s, np.int64), np.array(v, np.float64)) for key, (s, v) in found.items()}, num_torn


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _nothing() -> Any:
    import io

    return io.BytesIO()


def _config_files(directory: Path) -> list[Path]:
    resumes = list(directory.glob("config.from_step_*.yaml"))
    resumes.sort(key=lambda path: (path.stat().st_mtime, _step_of_config(path.name)))
    return [*([directory / _CONFIG] if (directory / _CONFIG).exists() else []), *resumes]


def _step_of_config(name: str) -> int:
    digits = name.removeprefix("config.from_step_").removesuffix(".yaml")
    return int(digits) if digits.isdigit() else 0


def _flatten(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return
    yield from _leaves("", tree)


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    elif prefix:
        yield prefix, tree


def _kept(root: Path) -> dict[int, int]:
    # Not by checkpoint.layout: it brings torch, and a page should not wait for that.
    found = {}
    for path in root.glob("global_step_*/manifest.json"):
        if (digits := path.parent.name.removeprefix("global_step_")).isdigit():
            found[int(digits)] = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return dict(sorted(found.items()))
