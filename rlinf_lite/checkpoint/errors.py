"""Errors of checkpoints. Each names the path, and can be pickled, because errors travel between ranks."""

from __future__ import annotations

from rlinf_lite.errors import UserError


class CheckpointError(UserError, RuntimeError):
    """Base of all errors of this package."""


class SaveError(CheckpointError):
    """A save did not complete; nothing was committed, earlier checkpoints are untouched."""


class RankSilent(CheckpointError, TimeoutError):
    """Another rank did not reach a collective of a save or load in time: it died or hangs."""


class DamagedCheckpoint(CheckpointError, ValueError):
    """A checkpoint does not match its manifest, or cannot be read."""


class UnsafeCheckpoint(DamagedCheckpoint):
    """A checkpoint asks for something that no checkpoint needs: classes to unpickle, or files elsewhere."""


class StateMismatch(CheckpointError, ValueError):
    """A checkpoint has other keys or shapes than the state to load into."""


class SectionMismatch(CheckpointError, ValueError):
    """A checkpoint has other sections (``actor/``, ``critic/``) than are to be loaded."""


class NoCheckpoint(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class WouldStartFresh(CheckpointError, FileExistsError):
    """A new run was asked for in a directory that already holds checkpoints."""
