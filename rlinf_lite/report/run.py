"""Reads the directory of a run: metrics, events, configs, checkpoints. Damaged rows are left out and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from rlinf_lite.errors import UserError
from rlinf_lite.observability import Event, read_events, read_jsonl_rows
from rlinf_lite.observability.events import EVENTS_FILE, RESTART, RESUME, SAVE
from rlinf_lite.observability.hub import METRICS_FILE

_CONFIG = "config.yaml"
_LARGEST = 1e300
"""Larger values are left out like infinities: the length of an axis could overflow."""


class ReportError(UserError, ValueError):
    """The directory is not that of a run."""


class Column(NamedTuple):
    """The finite values of one metric."""

    steps: np.ndarray
    """int64 [N], increasing."""
    values: np.ndarray
    """float64 [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The contents of a run's directory."""

    directory: Path
    columns: Mapping[str, Column]
    num_not_finite: Mapping[str, int]
    """Metric -> NaN and infinite values, which its column leaves out."""
    num_torn: int
    """Lines of ``metrics.jsonl`` that could not be read."""
    events: list[Event]
    configs: Mapping[str, Mapping[str, Any]]
    """``config.yaml``, then ``config.from_step_60.yaml`` of each resume -> settings by dotted key."""
    kept: Mapping[int, int]
    """Existing checkpoints: step -> bytes."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the last start."""
        return [{}, *self.configs.values()][-1]

    @property
    def name(self) -> str:
        return str(self.settings.get("runner.experiment_name", self.directory.resolve().name))

    @property
    def label(self) -> str:
        """Tells the run from others, which may have the same name."""
        return "/".join(self.directory.resolve().parts[-2:])

    def column(self, key: str) -> Column:
        """The values of a metric; empty if it was not logged."""
        return self.columns.get(key, Column(np.empty(0, np.int64), np.empty(0)))

    @property
    def steps(self) -> np.ndarray:
        """int64 [number of rows]."""
        return self.column("step").steps

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def restarts(self) -> list[Event]:
        return [event for event in self.events if event.kind in (RESTART, RESUME)]

    @property
    def saves(self) -> list[Event]:
        """The last save of each step, by step."""
        saves = {event.step: event for event in self.events if event.kind == SAVE and event.figures}
        return [saves[step] for step in sorted(saves) if step <= self.last_step]


def read_run(directory: Path) -> Run:
    """Read the directory of a run.

    Raises:
        ReportError: there is no such directory, or it is not that of a run. Names runs below it.
    """
    metrics = directory / METRICS_FILE
    if not directory.is_dir():
        remedy = "give that of a run, {output_dir}/{experiment_name}"
        raise ReportError(f"{directory}: there is no such directory", remedy=remedy)
    if not metrics.exists() and not (directory / _CONFIG).exists():
        runs = sorted(str(path.parent) for path in directory.glob(f"*/{METRICS_FILE}"))
        remedy = f"did you mean {' or '.join(runs[:3])}?" if runs else "give {output_dir}/{experiment_name}"
        raise ReportError(f"{directory}: not the directory of a run (no {METRICS_FILE}, no {_CONFIG})", remedy=remedy)
    columns, num_not_finite, num_torn = _read_metrics(metrics)
    configs = {path.name: _read_config(path) for path in _config_files(directory)}
    root = [{}, *configs.values()][-1].get("runner.checkpoint.root")
    return Run(
        directory=directory,
        columns=columns,
        num_not_finite=num_not_finite,
        num_torn=num_torn,
        events=read_events(directory / EVENTS_FILE),
        configs=configs,
        kept=_checkpoints(Path(root or directory / "checkpoints")),
    )


def _read_metrics(path: Path) -> tuple[dict[str, Column], dict[str, int], int]:
    """The columns (``step`` is one of them), how many values each leaves out, and how many lines are not rows."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    num_rows, last = 0, -1
    for row in read_jsonl_rows(path):
        step = row.get("step")
        if not isinstance(step, int) or step <= last:
            continue
        num_rows, last = num_rows + 1, step
        for key, value in row.items():
            if isinstance(value, (int, float)):
                steps, values = found.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    columns, num_not_finite = {}, {}
    for key, lists in found.items():
        column = Column(np.array(lists[0], np.int64), np.array(lists[1], np.float64))
        finite = np.abs(column.values) < _LARGEST
        columns[key] = Column(column.steps[finite], column.values[finite])
        num_not_finite[key] = int((~finite).sum())
    num_lines = len(path.read_bytes().splitlines()) if path.exists() else 0
    return columns, num_not_finite, num_lines - num_rows


def _config_files(directory: Path) -> list[Path]:
    """The config of the first start, then those of resumes in order of time."""
    resumes = sorted(directory.glob("config.from_step_*.yaml"), key=lambda path: path.stat().st_mtime)
    return [path for path in (directory / _CONFIG, *resumes) if path.exists()]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(_leaves("", yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}


def _leaves(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    elif prefix:
        yield prefix, tree


def _checkpoints(root: Path) -> dict[int, int]:
    # Without checkpoint.layout, because importing torch takes seconds.
    found = {}
    for path in root.glob("global_step_*/manifest.json"):
        if (digits := path.parent.name.removeprefix("global_step_")).isdigit():
            found[int(digits)] = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return dict(sorted(found.items()))
