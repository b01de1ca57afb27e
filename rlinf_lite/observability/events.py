"""What happens to a run besides its steps (starts, restarts, saves), one JSON line each in ``events.jsonl``.

A history, not a state: lines are only ever appended. Those of steps that are done again after a restart stay.
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
"""A new run begins; one goes on from a checkpoint; goes on by itself; has come back to its next step; does steps again;
somebody asked it to stop."""
SAVE, SAVE_FAILED = "save", "save failed"
"""A checkpoint is committed, with what it cost as figures; or it is not there."""


RESTARTS = "events/restarts"
"""The metric under which TensorBoard and wandb count them. Not in ``metrics.jsonl``, which no kill changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    kind: str
    step: int
    """Completed steps when it happened; of a save: of the checkpoint."""
    time: float
    """Seconds since 1970."""
    text: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, for example ``{"time/save_stall": 0.03}``."""


class EventLog:
    """Appends events. Each is with the operating system when `add` returns; a full disk costs events, not the run."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock, self._complained = path, clock, False

    def add(self, kind: str, step: int, text: str = "", figures: Mapping[str, float] | None = None) -> None:
        event = {"step": step, "kind": kind, "time": self._clock(), "text": text, "figures": dict(figures or {})}
        try:
            self._append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            if not self._complained:
                log_line(f"!! {self._path}: {error.strerror}; the run goes on without this record of its restarts")
            self._complained = True

    def _append(self, line: bytes) -> None:
        with open(self._path, "ab+", buffering=0, opener=open_fixed) as file:
            if file.tell():
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
                line = b"\n" + line if torn else line
            file.write(line)


def read_events(path: Path) -> list[Event]:
    """The events since the run in this directory began (a new run in the same directory begins anew), oldest first.

    Lines that a kill or a full disk has torn are left out; no file, no events.
    """
    if not path.exists():
        return []
    events = [event for line in path.read_bytes().splitlines() if (event := _event(line)) is not None]
    starts = [index for index, event in enumerate(events) if event.kind == START]
    return events[starts[-1] :] if starts else events


class History:
    """The restarts that a sink shows, each beside the first row that was completed after it.

    Args:
        committed_step: the run goes on from there: restarts before it were shown then; None: a new run.
    """

    def __init__(self, path: Path, *, committed_step: int | None) -> None:
        self._path, self._first_step = path, committed_step or 0
        self._num_bytes = self._num_read = 0
        self._waiting: list[Event] = []

    def new(self, step: int) -> list[Event]:
        """Those before ``step`` that were not given yet; costs a look at the file's size where nothing happened."""
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
        """How many there were before ``step``."""
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
    """How often the run went on after it had ended or lost something."""
    return sum(event.kind in (RESUME, RESTART) for event in events)
