"""When a checkpoint is saved: small policies, each a pure function of the moment between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rlinf_lite.config import RunnerConfig, seconds_of
from rlinf_lite.runner.signals import SAVE_SIGNAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What the policies know between two steps."""

    step: int
    """Completed steps."""
    last_step: int
    seconds_since_start: float
    """Since the driver process began."""
    seconds_since_save: float
    """Since the last save began; before the first save: since the first step began."""
    longest_step: float = 0.0
    """Seconds, validation included."""
    longest_save: float = 0.0
    """Seconds until the save was durable; 0: none was measured yet."""
    signalled: bool = False
    """A save was requested by signal."""
    improved: bool = False
    """The metric that checkpoints are kept by is better than ever before."""


@dataclass(frozen=True, slots=True)
class Due:
    """A save is due."""

    why: str = ""
    """For the log; empty for the ordinary interval."""
    stop: bool = False
    """End the run after it."""


class Policy(Protocol):
    """Decides whether a save is due."""

    def due(self, moment: Moment) -> Due | None:
        """Return why a save is due; None if it is not."""


@dataclass(frozen=True, slots=True)
class EverySteps:
    steps: int

    def due(self, moment: Moment) -> Due | None:
        return Due() if moment.step % self.steps == 0 else None


@dataclass(frozen=True, slots=True)
class EveryMinutes:
    minutes: float

    def due(self, moment: Moment) -> Due | None:
        since = moment.seconds_since_save / 60
        return Due(f"{since:.1f} minutes since the last one") if since >= self.minutes else None


@dataclass(frozen=True, slots=True)
class AtLastStep:
    def due(self, moment: Moment) -> Due | None:
        return Due() if moment.step == moment.last_step else None


@dataclass(frozen=True, slots=True)
class OnSignal:
    def due(self, moment: Moment) -> Due | None:
        return Due(f"on {SAVE_SIGNAL.name}") if moment.signalled else None


@dataclass(frozen=True, slots=True)
class OnBest:
    metric: str

    def due(self, moment: Moment) -> Due | None:
        return Due(f"best {self.metric} so far") if moment.improved else None


@dataclass(frozen=True, slots=True)
class BeforeDeadline:
    """Save and stop while there is still time: another step might take as long as the longest so far."""

    seconds: float
    margin: float = 1.2
    first_save: float = 0.02
    """Fraction of ``seconds`` that a save may take, until one was measured."""

    def due(self, moment: Moment) -> Due | None:
        left = self.seconds - moment.seconds_since_start
        save = moment.longest_save or max(moment.longest_step, self.first_save * self.seconds)
        if moment.step == moment.last_step or left >= (moment.longest_step + save) * self.margin:
            return None
        return Due(f"runner.max_time: {max(left, 0):.0f} s are left", stop=True)


def decide(policies: Sequence[Policy], moment: Moment) -> Due | None:
    """Combine all policies: their reasons for a save, or no reason if the ordinary interval is one of them."""
    found = [due for policy in policies if (due := policy.due(moment)) is not None]
    if not found:
        return None
    stop = any(due.stop for due in found)
    ordinary = not stop and any(not due.why for due in found)
    return Due("" if ordinary else ", ".join(due.why for due in found if due.why), stop)


def policies(runner: RunnerConfig) -> tuple[Policy, ...]:
    """Return the policies that the config asks for; a save at the last step and on the signal is always among them."""
    best = runner.checkpoint.keep_best.metric
    seconds = seconds_of(runner.max_time)
    return (
        AtLastStep(),
        OnSignal(),
        *([EverySteps(runner.save_interval)] if runner.save_interval > 0 else []),
        *([EveryMinutes(runner.save_interval_minutes)] if runner.save_interval_minutes > 0 else []),
        *([OnBest(best)] if best is not None and runner.checkpoint.save_on_best else []),
        *([BeforeDeadline(seconds)] if seconds is not None else []),
    )


class SaveRequest:
    """Whether a save was requested by signal since the last one began."""

    def __init__(self) -> None:
        self.pending = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.pending = True


@contextmanager
def save_requests() -> Iterator[SaveRequest]:
    """Take `SAVE_SIGNAL` as a request for a save instead of dying of it. Does nothing outside the main thread."""
    request = SaveRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(SAVE_SIGNAL, request.note)
    try:
        yield request
    finally:
        signal.signal(SAVE_SIGNAL, before)
