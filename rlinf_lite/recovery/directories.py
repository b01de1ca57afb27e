"""The directories of a run: where its metrics and checkpoints are, created and checked for writing before it starts."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_lite.config import ConfigError, RunnerConfig

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class Directories:
    """Where one run writes."""

    run: Path
    log: Path
    checkpoints: StoragePath
    made: tuple[Path, ...] = ()
    """Directories that did not exist before, outermost first."""

    @property
    def owned(self) -> list[Path]:
        """What no other driver may use meanwhile; the lock of a checkpoints directory within the run's is enough."""
        apart = [] if self.checkpoints.parent == self.run else [self.run]
        return [*([self.checkpoints] if isinstance(self.checkpoints, Path) else []), *apart]


def make_directories(runner: RunnerConfig) -> Directories:
    """Create the run's directories and make sure that they can be written; if they cannot, none is left behind.

    Raises:
        ConfigError: they cannot; names the key.
    """
    run, log = _run_directory(runner), Path(runner.logger.log_path)
    checkpoints = checkpoints_directory(runner)
    wanted: list[tuple[str, StoragePath]] = [
        ("runner.output_dir", run),
        ("runner.logger.log_path", log),
        ("runner.output_dir" if runner.checkpoint.root is None else "runner.checkpoint.root", checkpoints),
    ]
    made: list[Path] = []
    try:
        for key, directory in wanted:
            made += _missing(directory)
            _check_writable(key, directory)
    except ConfigError:
        remove_empty(made)
        raise
    return Directories(run=run, log=log, checkpoints=checkpoints, made=tuple(made))


def remove_empty(made: Sequence[Path]) -> None:
    """Undo `make_directories` where nothing was written: a refused start leaves the disk as it was."""
    for path in reversed(made):
        with suppress(OSError):  # something is in it, or another start has removed it
            path.rmdir()


def checkpoints_directory(runner: RunnerConfig) -> StoragePath:
    """``runner.checkpoint.root``, or ``checkpoints`` in the run's directory.

    Raises:
        ConfigError: it is a URL that cannot be used.
    """
    root = runner.checkpoint.root
    if root is None:
        return _run_directory(runner) / "checkpoints"
    if "://" not in root:
        return Path(root)
    # Imported here: it brings torch, which a run with a plain directory imports while Ray starts.
    from rlinf_lite.checkpoint import storage

    try:
        return storage.storage_path(root)
    except ValueError as error:
        raise ConfigError(f"runner.checkpoint.root={error}") from None


def has_saved(runner: RunnerConfig, checkpoints: StoragePath) -> bool:
    """Whether there are checkpoints that the same command resumes from with ``runner.resume_dir=auto``.

    Not with ``resume_mode=weights``, which looks for them by itself.
    """
    from rlinf_lite.checkpoint import layout

    return runner.resume_mode == "full" and bool(layout.committed(checkpoints))


def _run_directory(runner: RunnerConfig) -> Path:
    return Path(runner.output_dir) / runner.experiment_name


def _missing(directory: StoragePath) -> list[Path]:
    """What of ``directory`` and the directories above it does not exist yet, outermost first."""
    if not isinstance(directory, Path):
        return []
    return [path for path in reversed((directory, *directory.parents)) if not os.path.lexists(path)]


def _check_writable(key: str, directory: StoragePath) -> None:
    probe = directory / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(probe, Path):
            probe.touch(exist_ok=False)
        else:
            probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # every kind of storage has errors of its own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: cannot write in {directory} ({reason}); choose another directory") from None
