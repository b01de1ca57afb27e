"""Which kills strike a run, and when: drawn from the case's seed alone, on the clock of the undisturbed run."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from _job import Launch

ANYWHERE = ("driver", "actor", "rollout", "reward", "raylet", "all")
"""Who is killed, at any instant."""
TARGETED = ("phase", "damage", "change")
"""What random instants do not find: the raylet while a worker is in one phase of a step; parent and driver, and then a
bit of the newest checkpoint; parent and driver, and then the next driver before a change that a start makes on the
disk."""
KINDS = (*ANYWHERE, *TARGETED, "parent")
"""``driver`` and ``raylet`` are recovered by the parent process; after ``parent``, ``all``, ``damage`` and ``change``
the command is started again."""
MOST_KILLS = 3
START_SHARE = 0.4
"""Of all kills, those that fall into the start-up. How long that takes beside the steps differs from machine to
machine, and must not decide what a seed means: instants are uniform within the start-up, and uniform from the line of
the first step to the end of the process."""
ENDING = ("driver", "all", "damage", "change", "parent")
"""Those after which the driver is started again."""
_SAVE_INTERVALS = ("1", "1", "2", "3", "5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    victim: str
    """One of `KINDS`."""
    rank: int
    """Which of them, modulo their number; of a targeted kind: which phase, bit or change."""
    startup: bool
    share: float
    """Of the undisturbed run's start-up, or of the time from the line of its first step to the end of its process."""
    returns: float
    """Seconds after which a killed node is back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    kills: tuple[Kill, ...]
    save_interval: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The undisturbed run, in seconds since its process began."""

    steps: dict[int, float]
    """When the line of each step was printed."""
    end: float

    @classmethod
    def of(cls, launch: Launch) -> Timeline:
        assert launch.ended is not None
        steps = {line.step: line.at - launch.started for line in launch.steps}
        return cls(steps=steps, end=launch.ended - launch.started)

    def instant(self, kill: Kill) -> float:
        """When ``kill`` is due. One in the start-up counts from the start of a process, or from the kill before it."""
        first = self.steps[1]
        return kill.share * first if kill.startup else first + kill.share * (self.end - first)

    def due(self, kill: Kill, launch: Launch, last_kill: float) -> bool:
        """Whether it is time for ``kill``.

        In the start-up: of the first process, or of one that starts again after the kill before. Later: on a clock that
        each line of a step sets, so that a slow machine strikes where a fast one does; it runs on while something is
        being recovered.
        """
        now = time.monotonic()
        if kill.startup:
            return now - max(launch.started, last_kill) >= self.instant(kill)
        line = launch.line
        return line is not None and self.steps[line.step] + now - line.at >= self.instant(kill)


def draw(seed: int, case: int, victims: Sequence[str], num_kills: int | None, most: int | None = None) -> Plan:
    """The plan of one case.

    Args:
        num_kills: None: 1 to `MOST_KILLS`.
        most: of them; None: no limit.
    """
    rng = random.Random(f"{seed}/{case}")
    save_interval, drawn = rng.choice(_SAVE_INTERVALS), rng.randint(1, MOST_KILLS)
    kills = [_draw_kill(rng, victims) for _ in range(min(num_kills or drawn, most or sys.maxsize))]
    return Plan(kills=tuple(_ordered(kills)), save_interval=save_interval)


def _draw_kill(rng: random.Random, victims: Sequence[str]) -> Kill:
    victim = rng.choice(victims)
    return Kill(
        victim=victim,
        rank=rng.randrange(1 << 16),
        startup=rng.random() < START_SHARE and victim not in TARGETED,
        share=rng.random(),
        returns=rng.uniform(0, 10),
    )


def _ordered(kills: Sequence[Kill]) -> list[Kill]:
    """Those after the first step by their instants; those in a start-up before all, or after the end of a driver."""
    ordered = sorted((kill for kill in kills if not kill.startup), key=lambda kill: kill.share)
    for kill in (kill for kill in kills if kill.startup):
        places = [0, *(index + 1 for index, other in enumerate(ordered) if other.victim in ENDING)]
        ordered.insert(places[kill.rank % len(places)], kill)
    return ordered
