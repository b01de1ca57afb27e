"""Saves of a run: begun when a policy asks for it, followed during training, and logged when they end."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlinf_lite import readable
from rlinf_lite.checkpoint import SaveError, SaveReport
from rlinf_lite.checkpoint.manifest import SAVE_ID
from rlinf_lite.checkpoint.retention import METRICS
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.config import CheckpointConfig
from rlinf_lite.config.metric_names import MACHINE_METRICS
from rlinf_lite.observability import events, log_line
from rlinf_lite.runner.metrics import Metrics
from rlinf_lite.runner.policies import Due, Moment, Policy, SaveRequest, decide
from rlinf_lite.runner.progress import Progress


@dataclass(kw_only=True, slots=True)
class _InFlight:
    """A save that has begun, and what the ranks have reported about it."""

    step: int
    why: str
    save_id: str
    """Written to the manifest: a checkpoint of the same step may be of another save."""
    driver_seconds: float = 0.0
    """Seconds that the loop waited for it."""
    start_seconds: Sequence[float] = ()
    """Those of them that each rank counts in its own stall, too."""
    outcomes: list[SaveReport | SaveError | None] = field(default_factory=list)
    """By rank; None for a rank on which it has not ended yet."""

    def add(self, reported: Sequence[SaveReport | SaveError | None]) -> None:
        """Add what the ranks report. Each reports the end once, and not all of them between the same two steps."""
        known = self.outcomes or [None] * len(reported)
        self.outcomes = [new if new is not None else old for old, new in zip(known, reported, strict=True)]

    @property
    def failure(self) -> SaveError | None:
        """The error of the lowest rank that failed; None if none has."""
        return next((outcome for outcome in self.outcomes if isinstance(outcome, SaveError)), None)

    @property
    def ended(self) -> bool:
        """Whether every rank has reported the end."""
        return bool(self.outcomes) and None not in self.outcomes


@dataclass(kw_only=True)
class Saver:
    """Makes every checkpoint of the run, at most one at a time."""

    trainers: Trainers
    policies: Sequence[Policy]
    checkpoint: CheckpointConfig
    progress: Progress
    saved: int | None
    """Newest step whose checkpoint is known to be in the run's own directory; 0: a new run, with nothing to save yet.
    None if no step that counts is saved there, as after a start from another run's checkpoint."""
    last_step: int
    info: Mapping[str, Any]
    """What each manifest says about the run, whatever the step."""
    flush: Callable[[], None]
    """Makes the rows of the steps so far durable; a checkpoint must not be committed before them."""
    started: float
    """When the driver process began, by ``clock``."""
    request: SaveRequest
    is_committed: Callable[[int, str], bool]
    """Returns whether the checkpoint of a step exists and was written by the save with this id."""
    record: Callable[[str, int, str, Metrics], None] = lambda kind, step, text, figures: None
    """`EventLog.add`, called for each save that ended."""
    clock: Callable[[], float] = time.monotonic
    failed: str | None = None
    """Why the newest checkpoint that was due does not exist; None if it does."""
    stopped: bool = False
    """Whether the time is up: the run ends here, saved."""

    def __post_init__(self) -> None:
        self._in_flight: _InFlight | None = None
        self._logged_rules: set[str] = set()
        self._owed: tuple[int, str | None] | None = None
        """Step and id of a save that is due or was interrupted; the id is None if it had not begun."""
        self._metrics: Metrics = {}
        self._ended: list[Metrics] = []
        self._longest_step = self._longest_save = 0.0
        self._step_began = self._save_began = self.clock()

    def drain(self) -> None:
        """Wait for the save in flight, if there is one. A failure is logged."""
        if self._in_flight is not None:
            self._follow(self._in_flight, self.trainers.finish_save)

    def interrupt(self) -> None:
        """Give up following the save in flight, because actor ranks were lost. `settle` repeats it if necessary."""
        if (save := self._in_flight) is not None:
            if self._owed is None or self._owed[0] <= save.step:
                self._owed = save.step, save.save_id
            self._in_flight = None

    def went_back(self, saved: int | None) -> None:
        """Note that the run resumes from an older state: the steps after it are saved again.

        Args:
            saved: as the field, for that state.
        """
        self._owed = None
        if self.saved != self.progress.step:
            self.saved = saved

    def settle(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Repeat the save that was interrupted, unless it was committed nevertheless.

        If the run continues from an older state there is nothing to do: it will reach that step again.
        """
        owed, self._owed = self._owed, None
        self._step_began = self.clock()  # what a recovery took is no step
        if owed is None or self.progress.step < owed[0]:
            return
        step, save_id = owed
        if save_id is not None and self.is_committed(step, save_id):
            log_line(f"   the save of step {step} was committed before its workers were lost")
            self.saved, self.failed = step, None
        else:
            self._begin(Due(f"that of step {step} was interrupted"), state, self.progress.unlogged or self._metrics)

    def save_newest(self, why: str, state: Callable[[], Mapping[str, Any]]) -> None:
        """Wait for the save in flight; if the newest completed step is not saved by then, save it and wait."""
        self.drain()
        if self.progress.step != self.saved:
            self._begin(Due(why), state, self.progress.unlogged or self._metrics)
            self.drain()

    def drain_after_error(self) -> None:
        """Wait for the save in flight although the run ends with an error: it may be nearly written."""
        if (save := self._in_flight) is None:
            return
        log_line(f"waiting for the save of step {save.step}, which is still in flight ...")
        try:
            self.drain()
        except Exception as error:  # a consequence of the error that ended the run, which is reported
            log_line(
                f"!! the save of step {save.step} ended with the run: {(str(error) or repr(error)).splitlines()[0]}"
            )

    def poll(self) -> Metrics:
        """Return the metrics of a save that has ended. Called between the update and its metrics row."""
        if self._in_flight is not None:
            self._follow(self._in_flight, self.trainers.poll_save)
        return self._ended.pop(0) if self._ended else {}

    def between_steps(self, metrics: Metrics, state: Callable[[], Mapping[str, Any]]) -> None:
        """Begin a save if one is due.

        Args:
            metrics: of the step that just ended.
            state: returns the values for ``data.pt``.
        """
        improved, now = self._improved(metrics), self.clock()
        self._metrics = metrics
        self._longest_step = max(self._longest_step, now - self._step_began)
        if (due := decide(self.policies, self._moment(now, improved))) is not None:
            self._save_began, self.request.pending = now, False
            self._begin(due, state, metrics)
            self.stopped = due.stop
        self._step_began = self.clock()

    def _moment(self, now: float, improved: bool) -> Moment:
        return Moment(
            step=self.progress.step,
            last_step=self.last_step,
            seconds_since_start=now - self.started,
            seconds_since_save=now - self._save_began,
            longest_step=self._longest_step,
            longest_save=self._longest_save,
            signalled=self.request.pending,
            improved=improved,
        )

    def _improved(self, metrics: Metrics) -> bool:
        best = self.checkpoint.keep_best
        value = float(metrics.get(best.metric or "", math.nan))
        # An infinite value is not saved with the checkpoint (`comparable`), so it must not become the best.
        if best.metric is None or not self.checkpoint.save_on_best or not math.isfinite(value):
            return False
        return self.progress.improved(best.metric, value, best.mode)

    def _begin(self, due: Due, state: Callable[[], Mapping[str, Any]], metrics: Metrics) -> None:
        step, save_id = self.progress.step, uuid.uuid4().hex
        self._owed = step, None  # the wait for the one before may find that the ranks are gone
        self.drain()
        self._owed = None
        if step == self.saved:
            return  # it was saved by a signal, before its validation
        began, info = self.clock(), {**self.info, METRICS: comparable(metrics), SAVE_ID: save_id}
        save = self._in_flight = _InFlight(step=step, why=due.why, save_id=save_id)
        try:
            self.flush()
            if self.checkpoint.mode == "sync":
                save.add(self.trainers.save(step, state(), info))
            else:
                save.start_seconds = self.trainers.start_save(step, state(), info)
        except (SaveError, OSError) as error:
            if lost := self.trainers.gone():
                raise lost[0] from None  # the storage did not fail: the save can be repeated
            self._fail(save, error)
            return
        save.driver_seconds = self.clock() - began
        if save.ended:
            self._end(save)

    def _follow(self, save: _InFlight, ask: Callable[[], Sequence[SaveReport | SaveError | None]]) -> None:
        """Ask the ranks, by ``poll_save`` or ``finish_save``, how the save goes."""
        began = self.clock()
        save.add(ask())
        if save.failure is not None and not save.ended:
            save.add(self.trainers.finish_save())  # the other ranks are about to fail too
        save.driver_seconds += self.clock() - began
        if save.failure is not None:
            self._fail(save, save.failure)
        elif save.ended:
            self._end(save)

    def _fail(self, save: _InFlight, error: Exception) -> None:
        self._in_flight, self.failed = None, str(error)
        log_line(f"!! SAVE FAILED, there is no checkpoint of step {save.step}: {error}")
        self.record(events.SAVE_FAILED, save.step, str(error), {})

    def _end(self, save: _InFlight) -> None:
        reports = [outcome for outcome in save.outcomes if isinstance(outcome, SaveReport)]
        measured = save_metrics(reports, save.driver_seconds, save.start_seconds)
        self._in_flight, self.failed, self.saved = None, None, save.step
        self._ended.append(measured)
        self.record(events.SAVE, save.step, save.why, measured)
        self._longest_save = max(self._longest_save, measured["time/save_durable"])
        for line in report_lines(reports[0], measured, save.why):
            log_line(line)
        for reason in reports[0].idle:
            if (rule := reason.partition(":")[0]) not in self._logged_rules:
                self._logged_rules.add(rule)
                log_line(f"!! runner.checkpoint.{reason}")


def save_metrics(reports: Sequence[SaveReport], driver_seconds: float, start_seconds: Sequence[float]) -> Metrics:
    """Compute the metrics of one save.

    Args:
        reports: by rank.
        driver_seconds: how long the loop waited for calls about this save.
        start_seconds: by rank, what of these calls the rank counts as its own stall, too; empty: all.
    """
    durable = max(report.durable_seconds for report in reports)
    held = [report.stall_seconds - start for report, start in zip(reports, start_seconds, strict=False)]
    return {
        "time/save_stall": driver_seconds + max([0.0, *held]),
        "time/save_durable": durable,
        "save/num_bytes": reports[0].num_bytes,
        "save/gb_per_second": reports[0].num_bytes / 1e9 / durable,
    }


def report_lines(report: SaveReport, measured: Metrics, why: str) -> Iterator[str]:
    """Yield the log lines of a save that ended."""
    if report.superseded is not None:
        yield f"   an older directory of the same name is now {report.superseded.name}"
    yield (
        f"   saved {report.path} ({readable.size(report.num_bytes)} in {measured['time/save_durable']:.2f} s, "
        f"{measured['save/gb_per_second']:.3f} GB/s; held the run for {measured['time/save_stall']:.3f} s)"
        f"{f': {why}' if why else ''}"
    )
    if report.removed:
        yield f"   removed {', '.join(path.name for path in report.removed)}: kept by no runner.checkpoint.keep_* rule"
    yield from (f"!! {problem}" for problem in report.problems)


def comparable(metrics: Metrics) -> dict[str, float]:
    """Return the metrics to store with a checkpoint: finite numbers about the model, not about the machine."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if math.isfinite(value) and not name.startswith(MACHINE_METRICS)
    }
