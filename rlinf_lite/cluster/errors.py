"""Errors of the cluster: what the rest of the program sees instead of Ray's exceptions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlinf_lite.errors import EXIT_WORKER_LOST, RESUME_ADVICE, UserError

_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)


class ClusterError(UserError, RuntimeError):
    """The cluster cannot run this job as configured: too few nodes, GPUs or CPUs, or no cluster at the address."""


class LostError(UserError, RuntimeError):
    """A part of the run is gone or silent. A restart recovers from it."""

    exit_code = EXIT_WORKER_LOST
    advice = RESUME_ADVICE


class WorkerLost(LostError):
    """A worker process is gone (killed, crashed, or its node died)."""

    def __init__(self, group: str, rank: int, reason: str, pid: int | None = None) -> None:
        """
        Args:
            pid: id of the process; None if Ray did not report it.
        """
        super().__init__(f"{group} rank {rank} was lost: {reason}")
        self.group, self.rank, self.reason, self.pid = group, rank, reason, pid


class WorkerHung(WorkerLost):
    """A worker process does not answer any more; it may still exist."""

    def __init__(self, group: str, rank: int, seconds: float) -> None:
        super().__init__(group, rank, f"no answer for {seconds:.0f} s (runner.hang_timeout)")


class NodeLost(LostError):
    """A node with workers of this run is no longer part of the cluster."""

    def __init__(self, nodes: Sequence[str]) -> None:
        super().__init__(f"node {', '.join(nodes)} is gone")
        self.nodes = list(nodes)


class Hung(LostError):
    """No call that the driver waits for has ended for too long."""

    def __init__(self, seconds: float, waiting: Sequence[tuple[str, int]]) -> None:
        names = ", ".join(f"{component} rank {rank}" for component, rank in waiting)
        super().__init__(f"no progress for {seconds:.0f} s (runner.hang_timeout); not answering: {names}")
        self.seconds, self.waiting = seconds, list(waiting)
        """(component, rank) of every worker that has not answered."""


class RayLost(LostError):
    """Ray itself is gone (its raylet on this machine, or its head): no part of the cluster can be reached."""


def is_broken_connection(error: Exception) -> bool:
    """Whether a collective says that another rank is gone, or cannot be reached."""
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
