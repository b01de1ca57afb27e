"""What the rest of the program sees instead of Ray's exceptions."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The cluster cannot run this job as configured: too few nodes, GPUs or CPUs, or no cluster at the address."""


class WorkerLost(RuntimeError):
    """A worker process is gone (killed, crashed, or its node died)."""

    def __init__(self, group: str, rank: int, reason: str) -> None:
        super().__init__(group, rank, reason)
        self.group, self.rank, self.reason = group, rank, reason

    def __str__(self) -> str:
        return f"{self.group} rank {self.rank} was lost: {self.reason}"
