"""What a save and a load report. Imports nothing heavy: drivers receive these from the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from rlinf_lite.checkpoint.manifest import Manifest
from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """A committed checkpoint."""

    path: StoragePath
    step: int
    num_bytes: int
    durable_seconds: float
    """From the call to the commit."""
    stall_seconds: float
    """How long `Checkpointer.start` and `Checkpointer.fence` blocked the caller on this rank."""
    superseded: StoragePath | None
    """Where an older directory of the same name was moved to; None if there was none."""
    removed: tuple[StoragePath, ...] = ()
    """Older checkpoints that retention deleted."""
    problems: tuple[str, ...] = ()
    """Older checkpoints that retention could not delete, with the reason."""
    idle: tuple[str, ...] = ()
    """Retention rules that deleted nothing because they have no candidate; see `RetentionReport.idle`."""

    @property
    def gb_per_second(self) -> float:
        """Durable throughput over all ranks."""
        return self.num_bytes / 1e9 / self.durable_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """Describes a checkpoint that was loaded."""

    path: StoragePath
    manifest: Manifest
    load_seconds: float
    rng_restored: bool
    """False if only a part was loaded; or if any rank's section was written by other ranks, or only one of the two has
    a GPU: then the RNG state of the ranks of that section was derived anew from (seed, step, rank)."""
    num_bytes: int
    """Bytes read by all ranks together."""
