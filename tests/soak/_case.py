"""One case: a run, its kills, what a scheduler would do after each, and what is left of it at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import psutil
from _job import Job, Launch, kill
from _plan import Kill, Plan, Timeline
from _traps import CHANGES, PHASES, Damage, Traps, damage
from _victims import Victim, below, strike

if TYPE_CHECKING:  # only a run with --cluster needs it
    from _nodes import Nodes

_USER_ERROR = 2  # what a scheduler does not start again
_GIVEN_UP = 3
_MOST_EQUAL_DEATHS = 3  # with no step between them they look like a loop, which is given up
_TICK = 0.01
_ABSENT_TICK = 0.2
_LAST_BREATH = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    kill: Kill
    victims: tuple[str, ...]
    target: str
    """What a targeted kind was aimed at."""
    step: int
    """The last one whose line this driver had printed; 0: none yet."""
    seconds: float
    """Since that line, or since the driver's start."""

    def __str__(self) -> str:
        who = self.victims[0] if len(self.victims) == 1 else f"all {len(self.victims)} processes"
        where = f" ({self.target})" if self.target else ""
        return f"{who}{where} {self.seconds:.2f} s {f'after step {self.step}' if self.step else 'into the start'}"


@dataclass(kw_only=True)
class Outcome:
    """What became of a case."""

    deaths: list[Death] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    """Of the commands, one after the other."""
    gave_up: int = 0
    """Commands that ended by themselves, with an error, before the run was done."""
    missed: int = 0
    """Kills that found nobody any more: the run, or its workers, had ended."""
    repeated: int = 0
    """Steps whose line was printed again: what the kills cost."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What differs from the undisturbed run, or why there is nothing to compare."""


class Case:
    """Runs a job under a plan."""

    def __init__(
        self, job: Job, plan: Plan, timeline: Timeline, nodes: Nodes | None, traps: Traps, limit: float
    ) -> None:
        """
        Args:
            limit: seconds after which the run counts as hanging.
        """
        self._job, self._timeline, self._nodes, self._traps, self._limit = job, timeline, nodes, traps, limit
        self._pending = deque(plan.kills)
        self._most_restarts = 2 * len(plan.kills) + 2
        self._last_kill, self._again = 0.0, 0.0
        self._excused, self._deaths_before = False, 0
        self._armed: Kill | None = None
        self._damage: int | None = None
        """Which bit is to be flipped before the next start."""
        self._damages: list[Damage] = []
        self._below: set[psutil.Process] = set()
        self._struck: set[psutil.Process] = set()
        self._launches: list[Launch] = []
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """To the end of the run, or until it is clear that it has none."""
        began = time.monotonic()
        try:
            self._start()
            while not self._ended():
                if time.monotonic() - began > self._limit:
                    self.outcome.wrong.append(f"hangs: not at its end after {self._limit:.0f} s")
                    break
                self._tend()
                time.sleep(_TICK)
        finally:
            self._launches[-1].kill()
            self._traps.clear()
            for each in self._damages:
                each.undo()
        steps = [line.step for launch in self._launches for line in launch.steps]
        self.outcome.missed = len(self._pending)
        self.outcome.repeated = len(steps) - len(set(steps))
        self._look_for_orphans()
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def _start(self) -> None:
        self._excused, self._deaths_before = False, len(self.outcome.deaths)
        if self._damage is not None:
            found = damage(self._job.directory / "checkpoints", self._damage)
            self._damage = None
            self._damages += [found] if found else []
            self._name_target(found.name if found else "no checkpoint to damage")
        self._launches.append(start(self._job, self._nodes))

    def _ended(self) -> bool:
        """Whether the run is over; starts its driver again where a scheduler would."""
        code = self._launches[-1].poll()
        if code is None:
            return False
        self.outcome.exit_codes.append(code)
        if code == 0:
            return True
        deaths = len(self.outcome.deaths) - self._deaths_before
        if not self._excused and not (code == _GIVEN_UP and deaths >= _MOST_EQUAL_DEATHS):
            self.outcome.gave_up += 1
        if code == _USER_ERROR:
            self.outcome.wrong.append(f"exit code {code}, which says that a restart will not help")
            return True
        if len(self._launches) > self._most_restarts:
            self.outcome.wrong.append(f"still ends early after {self._most_restarts} restarts")
            return True
        self._start()
        return False

    def _tend(self) -> None:
        now, launch = time.monotonic(), self._launches[-1]
        if self._nodes is not None:
            self._nodes.tend()
        if not self._pending or now < self._again or not self._timeline.due(self._pending[0], launch, self._last_kill):
            return
        kill_ = self._pending[0]
        if kill_.victim == "phase" and not self._in_phase(kill_):
            return
        self._below.update(below(launch, self._nodes))
        if not (victims := strike(kill_, launch, self._job.directory, self._nodes, self._struck)):
            self._again = now + _ABSENT_TICK  # no such process yet
            return
        self._last_kill = time.monotonic()
        self._pending.popleft()
        self._struck.update(victim.process for victim in victims)
        self._excused |= any(victim.name == "parent" for victim in victims)
        self.outcome.deaths.append(_death(kill_, victims, launch))
        if kill_.victim == "phase":
            self._name_target(_phase(kill_))
        elif kill_.victim == "damage":
            self._damage = kill_.rank
        elif kill_.victim == "change":
            change = CHANGES[kill_.rank % len(CHANGES)]
            self._traps.arm(change)
            self._name_target(f"and the next driver before {change}")

    def _in_phase(self, kill_: Kill) -> bool:
        """Whether a worker is in the phase now; lets the next one that comes there wait for the kill."""
        if self._armed is not kill_:
            self._armed = kill_
            self._traps.arm(_phase(kill_))
        return self._traps.is_reached(_phase(kill_))

    def _name_target(self, text: str) -> None:
        self.outcome.deaths[-1] = replace(self.outcome.deaths[-1], target=text)

    def _look_for_orphans(self) -> None:
        """Nothing that a killed driver had started may outlive it for long."""
        deadline = time.monotonic() + _LAST_BREATH
        while (left := [process for process in self._below if _lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            self.outcome.wrong.append(f"left behind: process {process.pid}, {' '.join(process.cmdline())[:60]}")
            kill(process)


def start(job: Job, nodes: Nodes | None) -> Launch:
    """A driver of ``job``, on ``nodes`` if there are some, else with a Ray of its own."""
    return job.start({"RAY_ADDRESS": "local"} if nodes is None else nodes.start())


def _death(kill_: Kill, victims: Sequence[Victim], launch: Launch) -> Death:
    line = launch.line
    step, since = (0, launch.started) if line is None else (line.step, line.at)
    names = tuple(victim.name for victim in victims)
    return Death(kill=kill_, victims=names, target="", step=step, seconds=time.monotonic() - since)


def _phase(kill_: Kill) -> str:
    return PHASES[kill_.rank % len(PHASES)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
