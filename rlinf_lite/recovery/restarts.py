"""How often a run may be restarted, and when a restart would only end the same way again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Self

from rlinf_lite.errors import EXIT_WORKER_LOST, NOTHING_LOST, UserError

_AGAIN = "start the same command again, with runner.resume_dir=auto if the run has saved a checkpoint"
_MOST_EQUAL_ERRORS, _MOST_EQUAL_DEATHS = 2, 3
"""How many equal ends in a row are a loop. An error that came twice comes again; a kill may come twice by chance."""


class GaveUp(UserError, RuntimeError):
    """The run is not restarted any more; the message says why, and what to do."""

    exit_code = EXIT_WORKER_LOST
    advice = NOTHING_LOST


@dataclass(kw_only=True, slots=True)
class RestartBudget:
    """How often a run may be restarted, over all of its driver processes.

    The monotonic clock serves all of them: it counts from the machine's start.
    """

    max_restarts: int
    window_seconds: float
    restarts: list[float] = field(default_factory=list)
    """When, by the clock."""
    last_step: int | None = None
    last_cause: str | None = None
    times: int = 0
    """How often in a row the last cause came at the last step."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)

    def admit(self, *, step: int, cause: str, death: bool) -> int:
        """Ask for one restart.

        Args:
            step: how many steps were completed when it happened.
            cause: what happened, free of all that differs when the same happens again (process ids, times, hosts).
            death: a process died, rather than raised an error.

        Returns:
            The number of this restart within the window: 1, 2, ...

        Raises:
            GaveUp: no restart.
        """
        self._count_same_end(step, cause)
        if self.max_restarts <= 0:
            raise GaveUp(
                f"{cause}\nrunner.max_restarts={self.max_restarts}: the run is not restarted; raise it, or {_AGAIN}"
            )
        if self.times >= (_MOST_EQUAL_DEATHS if death else _MOST_EQUAL_ERRORS):
            raise GaveUp(
                f"{cause}\nthis happened {self.times} times in a row with {step} steps completed: a restart would end "
                f"the same way; remove the cause, then {_AGAIN}"
            )
        return self._spend(cause)

    def to_json(self) -> str:
        """Everything but the clock."""
        return json.dumps({entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "clock"})

    @classmethod
    def from_json(cls, text: str, *, clock: Callable[[], float] = time.monotonic) -> Self:
        """What `to_json` wrote on this machine."""
        return cls(**json.loads(text), clock=clock)

    def _count_same_end(self, step: int, cause: str) -> None:
        same = (step, cause) == (self.last_step, self.last_cause)
        self.times = self.times + 1 if same else 1
        self.last_step, self.last_cause = step, cause

    def _spend(self, cause: str) -> int:
        now = self.clock()
        self.restarts = [then for then in self.restarts if 0 <= now - then < self.window_seconds]
        if len(self.restarts) >= self.max_restarts:
            raise GaveUp(
                f"{cause}\nthe run was restarted {len(self.restarts)} times within {now - self.restarts[0]:.0f} s: "
                f"no more than runner.max_restarts={self.max_restarts} within "
                f"runner.restart_window={self.window_seconds:g} s; remove the cause, or raise runner.max_restarts, "
                f"then {_AGAIN}"
            )
        self.restarts.append(now)
        return len(self.restarts)


def budget_for(max_restarts: int, window_seconds: float, spent: str | None) -> RestartBudget:
    """The budget of a driver.

    Args:
        max_restarts, window_seconds: from this driver's config.
        spent: `RestartBudget.to_json` of what earlier drivers have used; None for the first one.
    """
    budget = RestartBudget(max_restarts=max_restarts, window_seconds=window_seconds)
    if spent is not None:
        budget = RestartBudget.from_json(spent)
        budget.max_restarts, budget.window_seconds = max_restarts, window_seconds
    return budget
