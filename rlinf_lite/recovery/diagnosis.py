"""Find out from an error what failed: which workers died or hang, and whether the run can recover."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlinf_lite.checkpoint import RankSilent
from rlinf_lite.cluster.errors import Hung, NodeLost, RayLost, WorkerLost, is_broken_connection
from rlinf_lite.cluster.logs import last_lines
from rlinf_lite.errors import UserError
from rlinf_lite.recovery.workers import Workers

_BLAME_SECONDS = 5.0


class Regrow(Exception):
    """Not an error: missing nodes are back, so the run can use all of its actor ranks again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why the loop ended, if the run can recover from it."""

    text: str
    """For the user."""
    cause: str
    """The same without varying details, to recognise repetitions; empty if nothing failed."""
    losses: Sequence[WorkerLost] = ()
    hung: Hung | None = None
    new_nodes: bool = False
    """Whether the slots must be reserved again."""
    trainers_too: bool = True
    """Whether the process group of policy and critic, or their state, is affected."""

    @property
    def death(self) -> bool:
        """Whether a process or node died, rather than raised an error."""
        return bool(self.losses) or self.new_nodes


def diagnose(error: Exception, workers: Workers, *, intact: bool) -> Failure:
    """What failed, if the run can recover from it.

    When a worker dies, those that were talking to it fail too, and their errors may arrive first. So dead workers are
    looked for before any error is believed.

    Args:
        intact: whether the trainers hold the state of the newest completed step.

    Raises:
        Exception: ``error`` itself, if the user has to act on it, or it would come again.
    """
    if isinstance(error, Regrow):
        return Failure(text=str(error), cause="", new_nodes=True)
    if isinstance(error, NodeLost):
        return Failure(text=str(error), cause="a node was lost", new_nodes=True)
    if isinstance(error, Hung):
        affected = {group.component for group in workers.trainers.groups}
        trainers = not intact or any(component in affected for component, _ in error.waiting)
        return Failure(
            text=str(error), cause=f"no answer from {sorted(error.waiting)}", hung=error, trainers_too=trainers
        )
    if isinstance(error, RayLost) or not isinstance(error, RuntimeError):
        raise error
    if isinstance(error, WorkerLost):
        # A worker that missed the result of a dead one looks dead, too: only those that are known to be gone count.
        return _of_losses(workers.gone(0.3) or [error], workers, intact)
    silent = isinstance(error, RankSilent)  # a rank waited for another: its error may arrive before Ray's of the death
    if isinstance(error, UserError) and not silent:
        raise error
    deadline = time.monotonic() + _BLAME_SECONDS
    while time.monotonic() < deadline:
        if losses := workers.gone(0.2):
            return _of_losses(losses, workers, intact)
    if silent or is_broken_connection(error):
        first = str(error).splitlines()[0]
        return Failure(text=f"the process group is broken: {first}", cause=re.sub(r"\d+", "#", first))
    raise error


def _of_losses(losses: Iterable[WorkerLost], workers: Workers, intact: bool) -> Failure:
    found = sorted(losses, key=lambda lost: (lost.group, lost.rank))
    names = {group.name for group in workers.trainers.groups}
    trainers = any(lost.group in names for lost in found)
    return Failure(
        text="\n".join(describe(lost) for lost in found),
        cause=", ".join(f"{lost.group} rank {lost.rank} was lost" for lost in found),
        losses=found,
        trainers_too=trainers or not intact,
    )


def describe(lost: WorkerLost) -> str:
    """A loss in words, with the last lines that the process wrote."""
    lines = [] if lost.pid is None else last_lines(lost.pid)
    return "\n".join([str(lost), *(f"      {line}" for line in lines)])
