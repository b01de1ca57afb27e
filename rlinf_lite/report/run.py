"""Reads the directory of a run: metrics, events, configs, checkpoints. Damaged rows are left out and counted."""

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
    """The directory is not that of a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A mark at a step of the x axis."""

    step: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """The cost of one save."""

    step: int
    stall_seconds: float
    durable_seconds: float
    num_bytes: float
    gb_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The resolved config of one start."""

    name: str
    """``config.yaml``, or ``config.from_step_60.yaml`` of a resume."""
    values: Mapping[str, Any]
    """Dotted key -> value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The contents of a run's directory."""

    directory: Path
    columns: Mapping[str, Column]
    """Metric -> its rows."""
    num_torn: int
    """Lines of ``metrics.jsonl`` that could not be read."""
    events: list[Event]
    configs: list[Config]
    """The config of the first start, then those of resumes, in order."""
    kept: Mapping[int, int]
    """Existing checkpoints: step -> bytes."""
    last_row_time: float | None
    """Modification time of ``metrics.jsonl``; None if there is no such file."""

    @property
    def name(self) -> str:
        return str(self.setting("runner.experiment_name", self.directory.name))

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a config key at the last start."""
        return self.configs[-1].values.get(key, default) if self.configs else default

    def column(self, key: str) -> Column:
        """The rows of a metric; empty if it was not logged."""
        empty = (np.empty(0, np.int64), np.empty(0))
        return self.columns.get(key, empty)

    def finite(self, key: str) -> Column:
        """`column` without NaN, infinite and extremely large values."""
        steps, values = self.column(key)
        kept = drawable(values)
        return steps[kept], values[kept]

    @property
    def steps(self) -> np.ndarray:
        """The steps of all rows, in increasing order."""
        return self.column("step")[0]

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def phases(self) -> dict[str, Column]:
        """Seconds by phase, in the order of the phases within a step."""
        keys = [key for key in self.columns if key.startswith("time/") and key not in _NO_PHASES]
        return {key.removeprefix("time/"): self.columns[key] for key in keys}

    @property
    def start_time(self) -> float | None:
        """Seconds since 1970; of a run without events, the modification time of its first config file."""
        first = self.directory / _CONFIG
        if self.events and self.events[0].kind == START:
            return self.events[0].time
        return first.stat().st_mtime if first.exists() else None

    @property
    def restarts(self) -> list[Mark]:
        """The resumes and restarts; of a run without events, according to its config files."""
        found = [Mark(step=e.step, text=_restart_text(e)) for e in self.events if e.kind in (RESTART, RESUME)]
        resumes = [(_step_of_config(config.name), config.name) for config in self.configs[1:]]
        return found if self.events else [Mark(step=step, text=name) for step, name in resumes]

    @property
    def recoveries(self) -> list[Event]:
        return [event for event in self.events if event.kind == RECOVERED]

    @property
    def saves(self) -> list[Save]:
        """The saves, one per step, without those of steps that were rolled back.

        Runs that recorded no events: according to the rows in which saves ended, one or more steps later.
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
        row = {}
        for key, (steps, values) in self.columns.items():
            index = int(np.searchsorted(steps, step))
            if index < len(steps) and steps[index] == step:
                row[key] = float(values[index])
        return row


def drawable(values: np.ndarray) -> np.ndarray:
    """bool [N]: whether each value is neither NaN, nor infinite, nor so large that the length of an axis overflows."""
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
    """Read the directory of a run.

    Raises:
        ReportError: there is no such directory, or it is not that of a run. Names runs below it.
    """
    if not directory.is_dir():
        raise ReportError(
            f"{directory}: there is no such directory; give that of a run, {{output_dir}}/{{experiment_name}}"
        )
    metrics = directory / METRICS_FILE
    if not metrics.exists() and not (directory / _CONFIG).exists():
        raise ReportError(
            f"{directory}: not the directory of a run (no {METRICS_FILE}, no {_CONFIG}){_suggestion(directory)}"
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


def _suggestion(directory: Path) -> str:
    runs = sorted(str(path.parent) for path in directory.glob(f"*/{METRICS_FILE}"))
    return f"; did you mean {' or '.join(runs[:3])}?" if runs else "; give {output_dir}/{experiment_name}"


def read_columns(path: Path) -> tuple[dict[str, Column], int]:
    """Every metric of ``metrics.jsonl`` (``step`` is one of them), and the number of lines that are not rows."""
    if not path.exists():
        return {}, 0
    found: dict[str, tuple[list[int], list[float]]] = {}
    num_torn, last = 0, -1
    with path.open("rb") as lines:
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
    # Without checkpoint.layout, because importing torch takes seconds.
    found = {}
    for path in root.glob("global_step_*/manifest.json"):
        if (digits := path.parent.name.removeprefix("global_step_")).isdigit():
            found[int(digits)] = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return dict(sorted(found.items()))
