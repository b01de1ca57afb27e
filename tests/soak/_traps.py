"""Faults that wait to be armed: where Ray is lost, where a start is killed. And damage to a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlinf_lite import faults
from rlinf_lite.checkpoint import CheckpointError, layout
from rlinf_lite.checkpoint import manifest as manifests

PHASES = (
    "actor.rows",
    "rollout.train",
    "reward.score",
    "actor.update",
    "replica.write",
    "save.halfway",
    "rollout.val",
)
"""Of a step, in which Ray is lost: sync, rollout, grading, update, replica, save, validation."""
CRITIC_PHASES = ("critic.values", "critic.update")
"""Further ones, with a critic."""
CHANGES = (
    "resume.sweep",
    "resume.config",
    "resume.event",
    "resume.rollouts",
    "resume.metrics",
    "resume.ready",
)
"""Of the state on the disk, before each of which a start can be killed."""


class Traps:
    """One for each phase; they do nothing until they are armed, and strike once."""

    def __init__(self, directory: Path, phases: Sequence[str] = PHASES) -> None:
        """To be made before what the faults shall strike is started: they travel in this process's environment."""
        directory.mkdir()
        self._directory, self.phases = directory, phases
        actions = dict.fromkeys(phases, "wait") | dict.fromkeys(CHANGES, "kill")
        os.environ[faults.VARIABLE] = json.dumps(
            [
                {"phase": phase, "action": action, "armed": str(directory / phase), "mark": str(self._mark(phase))}
                for phase, action in actions.items()
            ]
        )

    def _mark(self, phase: str) -> Path:
        return self._directory / f"{phase}.reached"

    def arm(self, phase: str) -> None:
        """The next process that reaches it is struck."""
        self._mark(phase).unlink(missing_ok=True)
        (self._directory / phase).touch()

    def is_reached(self, phase: str) -> bool:
        return self._mark(phase).exists()

    def clear(self) -> None:
        """Disarm all of them."""
        for path in self._directory.iterdir():
            path.unlink()


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A bit that was flipped."""

    path: Path
    name: str
    """Of the file, from the checkpoints directory on."""
    inode: int
    position: int
    mask: int

    def undo(self) -> None:
        """Flip it back if the file still stands under its name.

        A save that was in flight may be committed after the damage: then the next start takes that one, and never
        reads the one below it. What was stepped over has another name, and what was saved anew is another file.
        """
        if self.path.exists() and self.path.stat().st_ino == self.inode:
            _flip(self.path, self.position, self.mask)


def damage(checkpoints: Path, number: int) -> Damage | None:
    """Flip one bit in the newest checkpoint that is intact, as long as there is another one to resume from.

    Args:
        number: says which bit.

    Returns:
        None: nothing was damaged.
    """
    intact = _intact(checkpoints)
    newest = next(intact, None)
    if newest is None or next(intact, None) is None:
        return None
    names = [name for name, file in sorted(manifests.read(newest).files.items()) if file.size]
    path = newest / names[number % len(names)]
    stat = path.stat()
    done = Damage(
        path=path,
        name=str(path.relative_to(checkpoints)),
        inode=stat.st_ino,
        position=number * 8191 % stat.st_size,
        mask=1 << number % 8,
    )
    _flip(path, done.position, done.mask)
    return done


def _flip(path: Path, position: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def _intact(checkpoints: Path) -> Iterator[Path]:
    """Newest first."""
    for path in sorted(layout.committed(checkpoints), key=lambda path: -(layout.step_of(path) or 0)):
        try:
            manifests.verify(path, manifests.read(path), "full")
        except CheckpointError:
            continue
        yield Path(path)
