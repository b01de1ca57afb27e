"""Records the events of a run (starts, restarts, saves) in ``events.jsonl``, one JSON line per event.

It is a history: lines are only appended, and the events of steps that a restart repeats stay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlinf_lite.observability.notices import log_line
from rlinf_lite.paths import open_fixed

EVENTS_FILE = "events.jsonl"
START, RESUME, RESTART, RECOVERED, BACK, STOP = "start", "resume", "restart", "recovered", "back", "stop"
"""In this order: a new run; a resume from a checkpoint; an automatic restart; the end of a recovery, before the next
step; steps that are repeated; a stop request."""
SAVE, SAVE_FAILED = "save", "save failed"
"""A checkpoint was committed, with its cost as figures; or it could not be saved."""
CHECK = "self-check"
"""What the self-check at the start found."""

RECOVERY_SECONDS = "time/recovery"
"""The figure of a `RECOVERED` event."""
RESTARTS = "events/restarts"
"""The metric that counts restarts in TensorBoard and wandb. Not in ``metrics.jsonl``, which a kill must not change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    kind: str
    step: int
    """Completed steps when it happened; of a save, the step of the checkpoint."""
    time: float
    """Seconds since 1970."""
    text: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Measurements, for example ``{"time/save_stall": 0.03}``."""


class EventLog:
    """Appends events. On a full disk events are lost, but the run continues."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock, self._warned = path, clock, False

    def add(self, kind: str, step: int, text: str = "", figures: Mapping[str, float] | None = None) -> None:
        """Append an event; it has reached the operating system when this returns."""
        event = {"step": step, "kind": kind, "time": self._clock(), "text": text, "figures": dict(figures or {})}
        try:
            self._append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                log_line(f"!! {self._path}: {error.strerror}; the run continues without a record of this event")
            self._warned = True

    def _append(self, line: bytes) -> None:
        with open(self._path, "ab+", buffering=0, opener=open_fixed) as file:
            if file.tell():
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
                line = b"\n" + line if torn else line
            file.write(line)


def read_events(path: Path) -> list[Event]:
    """The events of the last run in this directory, oldest first; none if there is no file.

    Lines that a kill or a full disk damaged are left out.
    """
    if not path.exists():
        return []
    events = [event for line in path.read_bytes().splitlines() if (event := _event(line)) is not None]
    starts = [index for index, event in enumerate(events) if event.kind == START]
    return events[starts[-1] :] if starts else events


class History:
    """The restarts that a metric sink shows, each with the first row completed after it.

    Args:
        committed_step: step that the run resumes from: earlier restarts were shown before. None for a new run.
    """

    def __init__(self, path: Path, *, committed_step: int | None) -> None:
        self._path, self._first_step = path, committed_step or 0
        self._num_bytes = self._num_read = 0
        self._waiting: list[Event] = []

    def new(self, step: int) -> list[Event]:
        """The events before ``step`` that were not returned yet. Reads the file only if its size has changed."""
        num_bytes = self._path.stat().st_size if self._path.exists() else 0
        if num_bytes != self._num_bytes:
            read = read_events(self._path)
            new = (event for event in read[self._num_read :] if event.step >= self._first_step)
            self._waiting += [event for event in new if event.kind in (RESUME, RESTART, RECOVERED, BACK)]
            self._num_bytes, self._num_read = num_bytes, len(read)
        ready = [event for event in self._waiting if event.step < step]
        self._waiting = [event for event in self._waiting if event.step >= step]
        return ready

    def num_restarts(self, step: int) -> int:
        """The number of restarts before ``step``."""
        return num_restarts(event for event in read_events(self._path) if event.step < step)


def _event(line: bytes) -> Event | None:
    try:
        row: Any = json.loads(line)
        event = Event(**row)
    except (ValueError, TypeError):
        return None
    sound = isinstance(event.step, int) and isinstance(event.time, (int, float)) and isinstance(event.figures, dict)
    return event if sound and all(isinstance(value, (int, float)) for value in event.figures.values()) else None


def num_restarts(events: Iterable[Event]) -> int:
    """How often the run was resumed or restarted."""
    return sum(event.kind in (RESUME, RESTART) for event in events)
