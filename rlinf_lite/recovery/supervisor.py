"""Supervises the step loop: when something dies, ends the loop, replaces what died, and enters the loop again.

`diagnosis` decides what counts as a failure, `restarts` how many are too many; `workers` starts and ends processes.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from rlinf_lite.cluster.errors import ClusterError, RayLost, WorkerHung, WorkerLost
from rlinf_lite.observability import events, log_line
from rlinf_lite.recovery.build import Build
from rlinf_lite.recovery.diagnosis import Failure, Regrow, describe, diagnose
from rlinf_lite.recovery.directories import has_saved
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.recovery.hangs import end_hung, end_stopped
from rlinf_lite.recovery.restarts import GaveUp, RestartBudget
from rlinf_lite.recovery.workers import Workers
from rlinf_lite.runner.interruption import Interrupted
from rlinf_lite.runner.loop import Runner
from rlinf_lite.stopwatch import Stopwatch

_GROW_SECONDS = 5.0
_DRAIN_SECONDS = 30.0


class Supervisor:
    """Runs the training loop, and recovers from failures of workers and nodes."""

    def __init__(self, build: Build, workers: Workers, budget: RestartBudget, link: ParentLink) -> None:
        self.build, self.workers, self.budget, self.link = build, workers, budget, link
        self.stop = build.stop
        self.runner: Runner | None = None
        self._sinks = ExitStack()
        self._recovery: Stopwatch | None = None
        self._starts = True
        """Until the first step is completed."""
        self._looked = time.monotonic()

    def run(self) -> Runner:
        """Build, train, and rebuild what dies, until the run is done.

        Raises:
            GaveUp: too many restarts.
            Interrupted: a stop request; completed steps are saved.
            RayLost: Ray is gone; only a new driver helps.
            Exception: an error that would come again.
        """
        failure: Failure | None = None
        try:
            while True:
                try:
                    runner = self._ready(failure)
                    runner.run()
                    return runner
                except Interrupted as request:
                    self._save_before_leaving(request)
                    raise
                except Exception as error:
                    failure = self._failure(error)
        finally:
            self._sinks.close()

    # -- start and recovery

    def _ready(self, failure: Failure | None) -> Runner:
        if self.runner is None:
            with self.stop.immediate():
                if failure is not None:
                    self._take_down_all(failure)
                self.runner = self.build.runner(self.workers, self._sinks, self._between_steps)
            self._report_start(self.runner)
            if self.runner.done:
                log_line(
                    f"nothing to do: step {self.runner.progress.step} of {self.runner.last_step} is already completed"
                )
            self.workers.repair_alone(lambda: self._runner.weights, self._admit_loss)
        elif failure is not None:
            self._recover(self.runner, failure)
        return self.runner

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None
        return self.runner

    def _report_start(self, runner: Runner) -> None:
        self.link.report(is_built=True, step=runner.progress.step)
        if self.link.handover.restart:
            self.build.events.add(events.RESTART, runner.progress.step, self.link.handover.restart)

    def _recover(self, runner: Runner, failure: Failure) -> None:
        """Bring everything back to the state after the newest completed step that is still available."""
        if self._recovery is None:
            self._recovery = Stopwatch()
        watch = self._recovery
        if failure.trainers_too:
            runner.intact = False
            runner.saver.interrupt()
        self._take_down(failure)
        watch.lap("tear down")
        if failure.trainers_too:
            self.build.bring_up_again(self.workers, runner)
            watch.lap("rebuild")
            self.build.restore(runner, self.workers, self._sinks)
            runner.intact = True
            watch.lap("restore")
        else:
            self.workers.set_up_engines()
            watch.lap("rebuild")
        runner.weights = self.workers.weight_sync()
        runner.generation.forget_started()

    def _take_down(self, failure: Failure) -> None:
        if failure.new_nodes:
            try:
                self._take_down_all(failure)
            except ClusterError as error:
                raise GaveUp(str(error)) from None
            return
        self.workers.replace_lost(failure.losses)
        if failure.trainers_too:
            self.workers.reset_trainers()

    def _take_down_all(self, failure: Failure) -> None:
        replicas = self.runner.replicas if self.runner is not None else None
        if replicas is not None:
            replicas.forget_holders()
        if failure.new_nodes:
            self.workers.rebuild()
        else:
            self.workers.restart()

    # -- failures

    def _failure(self, error: Exception) -> Failure:
        """The failure, if the run can recover from it. Otherwise waits for the save in flight and raises."""
        runner = self.runner
        step = self.build.first_step if runner is None else runner.progress.step
        try:
            failure = diagnose(error, self.workers, intact=runner is not None and runner.intact)
            if failure.hung is not None:
                failure = replace(failure, losses=end_hung(self.workers, failure.hung))
            self._admit(step, failure.text, failure.cause, death=failure.death)
        except RayLost:
            raise  # the workers end with it: nothing to wait for
        except GaveUp:
            self._drain_saves()
            if self.stop.reason is not None:  # the sender of the signal may have ended the workers, too
                raise Interrupted(self.stop.reason, self.stop.code) from None
            raise
        except Exception:
            self._drain_saves()
            raise
        return failure

    def _drain_saves(self) -> None:
        """Give a save in flight some seconds; ranks that wait for a failed one may never answer."""
        if self.runner is not None and not self.workers.trainers.gone(0.3):
            watch = self.workers.session.watch
            watch.hang_timeout = min(watch.hang_timeout, _DRAIN_SECONDS) if watch.hang_timeout > 0 else _DRAIN_SECONDS
            self.runner.saver.drain_after_error()

    @property
    def has_saved(self) -> bool:
        """Whether the same command needs ``runner.resume_dir=auto`` to resume the run: its directory has checkpoints.

        Not with ``resume_mode=weights``, which looks for them by itself; nor before a start is through, because until
        then the newest checkpoint may be one that this start was told to go back from.
        """
        return self.runner is not None and has_saved(self.build.config.runner, self.build.checkpoints)

    def _admit(self, step: int, text: str, cause: str, *, death: bool) -> None:
        log_line("\n".join(f"!! {line}" for line in text.splitlines()))
        if cause:
            number = self.budget.admit(step=step, cause=cause, death=death)
            self.link.report(budget=self.budget.to_json())
            log_line(f"   recovering, with {step} steps completed (restart {number} of {self.budget.max_restarts})")
        self.build.events.add(events.RESTART, step, text)

    def _admit_loss(self, lost: WorkerLost) -> None:
        """Admit the loss of a rollout or reward worker, which is replaced while the step continues."""
        self._recovery = self._recovery or Stopwatch()
        if isinstance(lost, WorkerHung):
            component = "rollout" if lost.group == self.workers.rollouts.name else "reward"
            end_stopped(self.workers, [(component, lost.rank)])
        cause = f"{lost.group} rank {lost.rank} was lost"
        self._admit(self._runner.progress.step, describe(lost), cause, death=True)

    # -- between steps

    def _between_steps(self) -> None:
        if self._recovery is not None:
            self._recovery.lap("first step")
            line = self._recovery.line("recovered in")
            log_line(f"   {line}")
            figures = {events.RECOVERY_SECONDS: self._recovery.seconds}
            self.build.events.add(events.RECOVERED, self._runner.progress.step, line, figures)
            self._recovery = None
        if self._starts:
            self._starts = False
            self.build.startup.lap("first step")
            log_line(f"   {self.build.startup.line('first step after')}")
        self.link.report_step(self._runner.progress.step)
        self.workers.note()
        self.workers.spares.start()
        now = time.monotonic()
        if self.workers.session.config.elastic and now - self._looked >= _GROW_SECONDS:
            self._looked = now
            self._grow(self._runner)

    def _grow(self, runner: Runner) -> None:
        if runner.done or not self.workers.session.can_grow:
            return
        runner.saver.drain()
        if runner.replicas is None:
            runner.saver.save_newest("before nodes that are back are taken in", runner.state)
        raise Regrow("cluster.elastic: there is room for all actor ranks again; they are taken in")

    def _save_before_leaving(self, request: Interrupted) -> None:
        """Save the newest completed step within the remaining grace period."""
        if self.runner is None:
            return
        self.build.events.add(events.STOP, self.runner.progress.step, request.reason)
        self.workers.session.watch.often.clear()  # the stop request was noticed
        self.workers.session.watch.rarely.clear()
        if self.runner.intact:
            try:
                self.runner.saver.save_newest(f"on {request.reason}", self.runner.state)
            except Exception as error:
                log_line(
                    f"!! the newest completed step could not be saved: {(str(error) or repr(error)).splitlines()[0]}"
                )
        else:
            log_line(
                "!! stopped in the middle of an update or a recovery, which is given up; earlier checkpoints are kept"
            )
