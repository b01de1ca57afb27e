"""The self-check of a run: once per start of the driver, when the engines hold their first weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.cluster.workers.trainer import Trainers
from rlinf_lite.config import Config
from rlinf_lite.observability import events, log_line
from rlinf_lite.selfcheck.records import CheckResult, UpdateCheck, by_operation, result_of


class SelfCheck:
    """Checks, on the workers as they are, that engine and update repeat their bits, and logs a line."""

    def __init__(
        self, config: Config, rollouts: RolloutWorkers, trainers: Trainers, record: Callable[[str, int, str], None]
    ) -> None:
        """
        Args:
            record: appends an event: kind, completed steps, text.
        """
        self._config, self._rollouts, self._trainers, self._record = config, rollouts, trainers, record
        self._is_due = config.cluster.self_check

    def run_once(self, step: int) -> None:
        """Check, unless it is done or turned off. The engines hold the weights after ``step`` steps.

        Raises:
            NotDeterministic: an operation has no deterministic form.
            WorkerLost, Hung: as `wait_all`; the next call begins again.
        """
        if not self._is_due:
            return
        began = time.perf_counter()
        result = self._check()
        self._is_due = False
        seconds = time.perf_counter() - began
        log_line(f"{'' if result.is_good else '!! '}{result}, {seconds:.2f} s")
        self._record(events.CHECK, step, str(result))

    def _check(self) -> CheckResult:
        engines = self._rollouts.self_check()
        responses = engines[0].groups
        trainers = self._trainers.self_check(responses)
        if any(check.difference for checks in trainers for check in checks):
            names = self._trainers.first_operations(responses)
            trainers = [_with_operation(checks, name) for checks, name in zip(trainers, names, strict=True)]
        return result_of(self._config, engines, *trainers)


def _with_operation(checks: Sequence[UpdateCheck], name: str | None) -> list[UpdateCheck]:
    return [
        check if check.difference is None else replace(check, difference=by_operation(check.difference, name))
        for check in checks
    ]
