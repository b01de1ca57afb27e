"""Ray's exceptions about workers, translated into the cluster's own."""

from __future__ import annotations

import re

from ray import exceptions as ray_errors

from rlinf_lite import numerics
from rlinf_lite.cluster.errors import WorkerLost

LOST = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.OutOfMemoryError,
    ray_errors.RaySystemError,
)
"""What Ray raises when the process that was to answer, or an object that a call was given, is gone."""


def cause_of(error: ray_errors.RayTaskError, worker: str) -> BaseException:
    """Return what the method raised, with the worker's name and remote traceback as notes.

    Args:
        worker: for the notes, for example ``"ActorGroup rank 0"``.
    """
    cause = error.cause if isinstance(error.cause, BaseException) else RuntimeError(str(error))
    cause = numerics.user_error(cause) or cause
    cause.add_note(f"in {worker}")
    cause.__cause__ = None
    cause.add_note(str(error))
    return cause


def worker_lost(error: BaseException, group: str, rank: int) -> WorkerLost:
    """Read from Ray's report which process it was, and the one sentence that says what happened to it."""
    text = " ".join(str(error).split())
    process = re.search(r"pid: (\d+) .*?ip: (\S+)", text)
    report = text.rpartition("exit type")[2]
    detail = re.search(r"(?:Worker exit detail:|because) (.*?)(?: Some common causes|$)", report)
    reason = (detail[1] if detail else text)[:300]
    if process is None:
        return WorkerLost(group, rank, reason)
    return WorkerLost(group, rank, f"process {process[1]} on {process[2]}: {reason}", pid=int(process[1]))
