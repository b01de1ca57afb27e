"""One case: a run, its kills, what a scheduler would do after each, and what is left of it at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
from _job import Job, Launch, StepLine, kill
from _plan import GROUPS, Kill, Pace
from _traps import CHANGES, Damage, Traps, damage
from _victims import below, strike

if TYPE_CHECKING:  # only a run with --cluster needs it
    from _nodes import Nodes

_USER_ERROR = 2  # what a scheduler does not start again
_GIVEN_UP = 3
_EQUAL_DEATHS = 3  # in a row, with no step between them, look like a loop, which is given up
_TICK = 0.01
_ABSENT_TICK = 0.2
_LAST_BREATH = 30.0


@dataclass(kw_only=True, slots=True)
class Death:
    kill: Kill
    victims: list[str]
    step: int
    """The last one whose line this driver had printed; 0: none yet."""
    seconds: float
    """Since that line, or since the driver's start."""
    target: str = ""
    """What a targeted kind was aimed at."""

    def __str__(self) -> str:
        who = self.victims[0] if len(self.victims) == 1 else f"all {len(self.victims)} processes"
        where = f" ({self.target})" if self.target else ""
        return f"{who}{where} {self.seconds:.2f} s {f'after step {self.step}' if self.step else 'into the start'}"


def had_to_end(code: int, given_up: int | None, killed: Sequence[tuple[str, int]]) -> bool:
    """Whether a command had to end early: the restart budget gives up after three equal deaths, and all were ours.

    Args:
        code: its exit code.
        given_up: how many steps were completed, according to its last lines; None if they name no equal deaths.
        killed: under this command, in order: "driver", "raylet" or a group of workers, and the last step whose line
            the driver had printed, a moment before or after it counts as completed; 0 in a start.
    """
    last = killed[-_EQUAL_DEATHS:]
    return (
        code == _GIVEN_UP
        and given_up is not None
        and len(last) == _EQUAL_DEATHS
        and len({victim for victim, _ in last}) == 1
        and all(step == 0 or abs(step - given_up) <= 1 for _, step in last)
    )


@dataclass(kw_only=True)
class Outcome:
    """What became of a case."""

    deaths: list[Death] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    """Of the commands, one after the other."""
    ranks: list[int] = field(default_factory=list)
    """Actor ranks of the commands, in the elastic form."""
    gave_up: int = 0
    """Commands that ended early after three equal kills, as they should."""
    early: list[int] = field(default_factory=list)
    """Exit codes of those that ended early otherwise, with no parent killed."""
    missed: int = 0
    """Kills that found nobody any more: the run, or its workers, had ended."""
    repeated: int = 0
    """Steps whose line was printed again: what the kills cost."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What differs from the undisturbed run, or why there is nothing to compare."""


class Case:
    """Runs a job and strikes it."""

    def __init__(
        self, job: Job, kills: Sequence[Kill], pace: Pace, nodes: Nodes | None, traps: Traps, limit: float
    ) -> None:
        """
        Args:
            pace: as last seen; kept up to date.
            limit: seconds without a step, a start or a kill after which the run counts as hanging.
        """
        self._job, self._pace, self._nodes, self._traps, self._limit = job, pace, nodes, traps, limit
        self._pending = deque(kills)
        self._most_restarts = 2 * len(kills) + 2
        self._last_kill, self._again = 0.0, 0.0
        self._excused = False
        self._killed: list[tuple[str, int]] = []
        """For `had_to_end`."""
        self._line: StepLine | None = None
        self._armed: Kill | None = None
        self._change: str | None = None
        """Before which the next driver is to be killed."""
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
                if time.monotonic() - self._last_sign() > self._limit:
                    self.outcome.wrong.append(f"hangs: neither a step nor an end for {self._limit:.0f} s")
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

    def _last_sign(self) -> float:
        """When the run last did something, or had something done to it."""
        launch = self._launches[-1]
        return max(launch.started, self._last_kill, *(line.at for line in launch.steps[-1:]))

    def _start(self) -> None:
        self._excused, self._killed = False, []
        if self._damage is not None:
            found = damage(self._job.directory / "checkpoints", self._damage)
            self._damage = None
            self._damages += [found] if found else []
            self.outcome.deaths[-1].target = found.name if found else "no checkpoint to damage"
        joining = {"RAY_ADDRESS": "local"} if self._nodes is None else self._nodes.start()
        number = len(self._launches)
        self._launches.append(self._job.start(joining, number))
        if self._job.ranks_of is not None:
            self.outcome.ranks.append(self._job.ranks_of(number))

    def _ended(self) -> bool:
        """Whether the run is over; starts its driver again where a scheduler would."""
        code = self._launches[-1].poll()
        if code is None:
            return False
        self.outcome.exit_codes.append(code)
        if code == 0:
            return True
        self._look_at_trap()
        had_to = had_to_end(code, self._launches[-1].given_up, self._killed)
        self.outcome.gave_up += had_to
        if not had_to and not self._excused:
            self.outcome.early.append(code)
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
        self._look_at_trap()
        if (lines := launch.lines) and lines[-1] is not self._line:
            self._line = lines[-1]
            self._pace.take_in(lines, launch.started, self._last_kill)
        if not self._pending or now < self._again:
            return
        kill_ = self._pending[0]
        survived = bool(self.outcome.deaths) and self.outcome.deaths[-1].kill.victim in GROUPS
        if not self._pace.is_due(kill_, now, lines, max(launch.started, self._last_kill), survived):
            return
        if kill_.victim == "phase" and not self._in_phase(kill_):
            return
        self._below.update(below(launch, self._nodes))
        if not (victims := strike(kill_, launch, self._job.directory, self._nodes, self._struck)):
            self._again = now + _ABSENT_TICK  # no such process yet
            return
        self._last_kill = time.monotonic()
        self._pending.popleft()
        self._struck.update(victim.process for victim in victims)
        step, at = (lines[-1].step, lines[-1].at) if lines else (0, launch.started)
        names = [victim.name for victim in victims]
        self._note(Death(kill=kill_, victims=names, step=step, seconds=self._last_kill - at))

    def _note(self, death: Death) -> None:
        self.outcome.deaths.append(death)
        self._excused |= "parent" in death.victims
        self._killed.append((death.victims[0].split()[0].replace("gcs_server", "raylet"), death.step))
        if death.kill.victim == "phase":
            death.target = self._phase(death.kill)
        elif death.kill.victim == "damage":
            self._damage = death.kill.rank
        elif death.kill.victim == "change":
            self._change = CHANGES[death.kill.rank % len(CHANGES)]
            self._traps.arm(self._change)
            death.target = f"and the next driver before {self._change}"

    def _look_at_trap(self) -> None:
        """Take note of the driver that a ``change`` has killed."""
        if self._change is not None and self._traps.is_reached(self._change):
            self._change = None
            self._killed.append(("driver", 0))

    def _in_phase(self, kill_: Kill) -> bool:
        """Whether a worker is in the phase now; lets the next one that comes there wait for the kill."""
        if self._armed is not kill_:
            self._armed = kill_
            self._traps.arm(self._phase(kill_))
        return self._traps.is_reached(self._phase(kill_))

    def _phase(self, kill_: Kill) -> str:
        return self._traps.phases[kill_.rank % len(self._traps.phases)]

    def _look_for_orphans(self) -> None:
        """Nothing that a killed driver had started may outlive it for long."""
        deadline = time.monotonic() + _LAST_BREATH
        while (left := [process for process in self._below if _lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            self.outcome.wrong.append(f"left behind: process {process.pid}, {' '.join(process.cmdline())[:60]}")
            kill(process)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
