"""Which kills strike a run, and where: drawn from the seed alone, in steps, so that every machine strikes alike."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from _job import StepLine

GROUPS = ("actor", "critic", "rollout", "reward")
"""Of workers; the critic only in runs that have one."""
ANYWHERE = ("driver", "actor", "rollout", "reward", "raylet", "all")
"""Who is killed, at any instant."""
TARGETED = ("phase", "damage", "change")
"""What random instants do not find: the raylet while a worker is in one phase of a step; parent and driver, and then a
bit of the newest checkpoint; parent and driver, and then the next driver before a change that a start makes on the
disk."""
KINDS = (*ANYWHERE, *TARGETED, "parent")
"""In every run. ``driver`` and ``raylet`` are recovered by the parent process; after ``parent``, ``all``, ``damage``
and ``change`` the command is started again."""
CRITIC = "critic"
"""A kind in runs that have one."""
ONE_OF_SEVERAL = (*GROUPS, "raylet", "phase")
"""Those that kill one of the processes they may mean."""
MOST_KILLS = 3
MOST_RANKS = 4
START_SHARE = 0.4
"""Of all kills, those that fall into a start, or into the recovery from the kill before."""
_PHASE_STEPS = 6
"""Every phase of a step comes within so many steps: validation and saves are that frequent."""
_SAVE_INTERVALS = ("1", "1", "2", "3", "5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    victim: str
    """One of `KINDS`, or `CRITIC`."""
    rank: int
    """Which of them, modulo their number; of a targeted kind: which phase, bit or change."""
    step: int
    """It strikes when this step is completed; 0: in a start, or in the recovery from the kill before."""
    share: float
    """How long after that, or how far into the start: a fraction of what a step, start or recovery took last."""
    returns: float
    """Seconds after which a killed node is back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    kills: tuple[Kill, ...]
    save_interval: str


def draw_ranks(seed: int, case: int, start: int) -> int:
    """How many actor ranks a case's command has when it was started ``start`` times before, in the elastic form.

    Never as many as the time before.
    """
    rng, ranks = random.Random(f"{seed}/{case}/ranks"), 0
    for _ in range(start + 1):
        ranks = rng.choice([number for number in range(1, MOST_RANKS + 1) if number != ranks])
    return ranks


@dataclass(kw_only=True, slots=True)
class Pace:
    """How many seconds a start, a step and a recovery took when they were last seen, on this machine as it is now."""

    start: float
    """Of a driver, to the line of its first step."""
    step: float
    recovery: float
    """From a kill that the driver survives to the next line."""

    def take_in(self, lines: Sequence[StepLine], started: float, last_kill: float) -> None:
        """Measure what ended with the newest of a driver's ``lines``."""
        before, now = lines[-2].at if len(lines) > 1 else started, lines[-1].at
        if len(lines) == 1:
            self.start = self.start if last_kill > before else now - before
        elif last_kill > before:
            self.recovery = now - last_kill
        else:
            self.step = now - before

    def is_due(self, kill: Kill, now: float, lines: Sequence[StepLine], since: float, survived: bool) -> bool:
        """Whether it is time for ``kill``: at the latest when the step that it shall strike, or a start, is over.

        Args:
            lines: of the newest driver.
            since: when that driver was started, or the kill before struck, whichever was later.
            survived: whether the driver has outlived that kill.
        """
        if kill.step:
            reached = next((line for line in lines if line.step >= kill.step), None)
            over = reached is not None and lines[-1] is not reached
            return over or (reached is not None and now - reached.at >= kill.share * self.step)
        over = bool(lines) and lines[-1].at > since
        return over or now - since >= kill.share * (self.recovery if survived else self.start)


def draw(seed: int, case: int, victims: Sequence[str], num_kills: int | None, last_step: int, most: int = 0) -> Plan:
    """The plan of one case.

    Args:
        num_kills: None: 1 to `MOST_KILLS`.
        last_step: of the run.
        most: of them; 0: no limit.
    """
    rng = random.Random(f"{seed}/{case}")
    save_interval, drawn = rng.choice(_SAVE_INTERVALS), rng.randint(1, MOST_KILLS)
    kills = [_draw_kill(rng, victims, last_step) for _ in range(min(num_kills or drawn, most or sys.maxsize))]
    return Plan(kills=tuple(_ordered(kills)), save_interval=save_interval)


def _draw_kill(rng: random.Random, victims: Sequence[str], last_step: int) -> Kill:
    victim = rng.choice(victims)
    rank = rng.randrange(1 << 16)
    in_start = rng.random() < START_SHARE and victim not in TARGETED
    at = rng.random() * max(1, last_step - _PHASE_STEPS if victim == "phase" else last_step)
    return Kill(
        victim=victim,
        rank=rank,
        step=0 if in_start else 1 + int(at),
        share=at % 1,
        returns=rng.uniform(0, 10),
    )


def _ordered(kills: Sequence[Kill]) -> list[Kill]:
    """Those at a step in its order; those in a start before all, or in what follows the kill before."""
    ordered = sorted((kill for kill in kills if kill.step), key=lambda kill: (kill.step, kill.share))
    for kill in (kill for kill in kills if not kill.step):
        ordered.insert(kill.rank % (len(ordered) + 1), kill)
    return ordered
