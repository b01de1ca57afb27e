"""What can go wrong with a checkpoint. Every error names the path, and is picklable because it crosses processes."""

from __future__ import annotations

from rlinf_lite.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """Base of all errors of this package."""


class SaveError(CheckpointError):
    """A save did not complete; nothing was committed, earlier checkpoints are untouched."""


class RankSilent(CheckpointError, TimeoutError):
    """Another rank did not come to a common point of a save or load: it died, or hangs."""


class DamagedCheckpoint(CheckpointError, ValueError):
    """A checkpoint that does not match its manifest, or cannot be read."""


class UnsafeCheckpoint(DamagedCheckpoint):
    """A checkpoint whose files ask for something that no checkpoint needs (foreign classes, paths outside)."""


class StateMismatch(CheckpointError, ValueError):
    """A checkpoint that holds other state than the one asked for (missing keys, extra keys, other shapes)."""


class NoCheckpoint(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class WouldStartFresh(CheckpointError, FileExistsError):
    """A new run was asked for in a directory that already holds checkpoints."""
