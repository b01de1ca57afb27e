"""What the rest of the program sees instead of Ray's exceptions."""

from __future__ import annotations

from collections.abc import Sequence


class ClusterError(RuntimeError):
    """The cluster cannot run this job as configured: too few nodes, GPUs or CPUs, or no cluster at the address."""


class WorkerLost(RuntimeError):
    """A worker process is gone (killed, crashed, or its node died)."""

    def __init__(self, group: str, rank: int, reason: str) -> None:
        super().__init__(group, rank, reason)
        self.group, self.rank, self.reason = group, rank, reason

    def __str__(self) -> str:
        return f"{self.group} rank {self.rank} was lost: {self.reason}"


class WorkerHung(WorkerLost):
    """A worker process does not answer any more; it may still be there."""

    def __init__(self, group: str, rank: int, seconds: float) -> None:
        super().__init__(group, rank, f"no answer for {seconds:.0f} s (runner.hang_timeout)")
        self.args = (group, rank, seconds)


class NodeLost(RuntimeError):
    """A node that workers of this run sat on is no longer part of the cluster."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(list(nodes))
        self.nodes = list(nodes)

    def __str__(self) -> str:
        return f"node {', '.join(self.nodes)} is gone"


class Hung(RuntimeError):
    """Nothing that the driver waits for has come to an end for too long."""

    def __init__(self, seconds: float, waiting: Sequence[tuple[str, int]]) -> None:
        super().__init__(seconds, list(waiting))
        self.seconds, self.waiting = seconds, list(waiting)
        """(component, rank) of every worker that has not answered."""

    def __str__(self) -> str:
        names = ", ".join(f"{component} rank {rank}" for component, rank in self.waiting)
        return f"no progress for {self.seconds:.0f} s (runner.hang_timeout); not answering: {names}"


class RayLost(RuntimeError):
    """Ray itself (its raylet on this machine, or its head) is gone: nothing of the cluster can be reached any more."""
