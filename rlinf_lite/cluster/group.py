"""A group of like workers: spawned into slots, called together, mended, ended by handle. Ray's exceptions end here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions as ray_errors

from rlinf_lite import numerics
from rlinf_lite.cluster.errors import RayLost, WorkerLost
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.shell import WorkerLocation
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.work import Work
from rlinf_lite.types import MiniBatch

_GONE = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
    ray_errors.OutOfMemoryError,
    ray_errors.RaySystemError,
)


_GONE_SECONDS = 2.0
"""A dead process is known to be dead by then; one that is busy does not answer."""


@dataclass(kw_only=True, slots=True)
class _Member:
    """The process that is rank r now."""

    handle: Any
    prepared: list[ray.ObjectRef]
    """Calls that made it what it is; the first of them gives its `WorkerLocation`."""


class WorkerGroup:
    """Workers of one class, rank 0 first. Rank r sits in slot ``slots[r]`` of the session's placement."""

    def __init__(self, name: str, component: str, target: str, session: Session, spares: Spares, *args: Any) -> None:
        """Spawn ``target(rank, world_size, *args)`` in each slot of ``component``; returns before the processes are up.

        Args:
            name: for messages.
            target: ``"module:Class"``.
        """
        self.name, self.component = name, component
        self._target, self._session, self._spares, self._args = target, session, spares, args
        self.mend: Callable[[WorkerLost], None] | None = None
        """Called by `Work` when a worker is lost: must `replace` and prepare it, or raise. None: a loss
        is an error."""
        self._members: list[_Member] = []
        self.respawn()

    @property
    def size(self) -> int:
        return len(self._members)

    # -- processes

    def respawn(self) -> None:
        """New processes for every rank, as many as the session's placement has slots for; old ones are ended."""
        self.kill()
        slots = self._session.placement.slots[self.component]
        self._members = [self._spawn(rank, len(slots)) for rank in range(len(slots))]

    def replace(self, rank: int) -> None:
        """A new process for one rank: a spare if there is one. The old one, if it still lives, is ended."""
        old, self._members[rank] = self._members[rank], self._spawn(rank, self.size)
        guard.kill(old.handle)
        guard.wait([_ready(old)], timeout=_GONE_SECONDS)

    def _spawn(self, rank: int, size: int) -> _Member:
        slot = self._session.placement.slots[self.component][rank]
        handle = self._spares.take(slot) or self._session.start_process(self.name, self.component, slot)
        return _Member(handle=handle, prepared=[guard.ask(handle.adopt.remote, self._target, rank, size, *self._args)])

    def prepare_one(self, rank: int, method: str, *args: Any) -> None:
        """Call ``method`` on a rank that was replaced, without waiting; a failure comes out of the next call to it."""
        self._members[rank].prepared.append(self.start_one(rank, method, *args))

    def locations(self) -> list[WorkerLocation]:
        """Where each rank lives. Waits until all are up; raises as `call`."""
        return self.results([member.prepared[0] for member in self._members])

    def location(self, rank: int) -> WorkerLocation | None:
        """Where one rank lives; None: its process is not up yet, or died before it was."""
        if not self._has_adopted(rank):
            return None
        try:
            return self._get(self._members[rank].prepared[0], rank)
        except WorkerLost:
            return None

    def _has_adopted(self, rank: int) -> bool:
        return bool(guard.wait([self._members[rank].prepared[0]], timeout=0)[0])

    def gone(self, seconds: float) -> list[WorkerLost]:
        """The ranks that are gone; asks for at most ``seconds``, which those that are busy use up."""
        asked = {_ready(member): rank for rank, member in enumerate(self._members)}
        answered, _ = guard.wait(list(asked), num_returns=len(asked), timeout=seconds)
        return [lost for ref in answered if (lost := self._loss(ref, asked[ref])) is not None]

    def is_gone(self, rank: int) -> bool:
        """Whether a rank's process is dead; one that is only busy is not."""
        asked, _ = guard.wait([_ready(self._members[rank])], timeout=_GONE_SECONDS)
        return any(self._loss(ref, rank) for ref in asked)

    def reset(self, seconds: float) -> list[int]:
        """Let every rank drop what it shared with the others; returns the ranks that did not, in ``seconds``."""
        asked = {ref: rank for rank, ref in enumerate(self.start("reset"))}
        deadline = time.monotonic() + seconds
        waiting, failed = list(asked), []
        while waiting and (left := deadline - time.monotonic()) > 0:
            done, waiting = guard.wait(waiting, timeout=left)
            failed += [asked[ref] for ref in done if not self._succeeded(ref, asked[ref])]
        return sorted(failed + [asked[ref] for ref in waiting])

    def _succeeded(self, ref: ray.ObjectRef, rank: int) -> bool:
        try:
            self.result(ref, rank)
        except RayLost:
            raise
        except Exception:  # whatever it is: this process is not used any more
            return False
        return True

    def _loss(self, ref: ray.ObjectRef, rank: int) -> WorkerLost | None:
        try:
            self._get(ref, rank)
        except WorkerLost as lost:
            return lost
        return None

    def kill(self) -> None:
        """End every process of the group, by handle."""
        for member in self._members:
            guard.kill(member.handle)
        self._members = []

    # -- calls

    def start(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        """Call ``method`` on every rank without waiting; batches go into the object store once, for all of them."""
        self.look()
        if self.size > 1:
            args = tuple(guard.put(arg) if isinstance(arg, MiniBatch | list) else arg for arg in args)
        return [self.start_one(rank, method, *args) for rank in range(self.size)]

    def start_in_two(self, method: str, *args: Any) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
        """As `start`, for a method that returns a pair: so that the first can be had without fetching the second."""
        runs = [member.handle.run.options(num_returns=2).remote for member in self._members]
        pairs = [guard.ask(run, method, *args) for run in runs]
        return [first for first, _ in pairs], [second for _, second in pairs]

    def start_one(self, rank: int, method: str, *args: Any) -> ray.ObjectRef:
        """Call ``method`` on one rank without waiting."""
        return guard.ask(self._members[rank].handle.run.remote, method, *args)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every rank; results in rank order.

        Raises:
            WorkerLost: a rank is gone.
            Exception: whatever the method raised on the first rank that failed, with the rank in its notes.
        """
        return self.results(self.start(method, *args))

    def call_one(self, rank: int, method: str, *args: Any) -> Any:
        """Call ``method`` on one rank; raises as `call`."""
        return self.await_one(self.start_one(rank, method, *args), rank)

    def await_one(self, ref: ray.ObjectRef, rank: int) -> Any:
        """The value behind a reference that rank ``rank`` makes; raises as `call`."""
        self._session.watch.wait_one([ref], lambda _: (self.component, rank))
        return self.result(ref, rank)

    def results(self, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        """Results of one call a rank. Fails with the first failure: other ranks may be waiting for the failed one."""
        return results_of((self, refs))

    def result(self, ref: ray.ObjectRef, rank: int) -> Any:
        """The value behind a reference that rank ``rank`` made, and that is there.

        A rank that was replaced is believed only if all went well that should have prepared it: an engine whose weights
        did not come would generate from whatever was in memory.
        """
        value, prepared = self._get(ref, rank), self._members[rank].prepared
        while len(prepared) > 1:
            self._get(prepared[1], rank)
            prepared.pop(1)
        return value

    def _get(self, ref: ray.ObjectRef, rank: int) -> Any:
        try:
            return guard.get(ref)
        except ray_errors.RayTaskError as error:
            raise self._cause(error, ref, rank) from None
        except _GONE as error:
            raise WorkerLost(self.name, rank, _reason(error)) from None

    def _cause(self, error: ray_errors.RayTaskError, ref: ray.ObjectRef, rank: int) -> BaseException:
        for earlier in self._members[rank].prepared:  # what it could not become explains what it could not do
            if earlier is not ref and guard.wait([earlier], timeout=0)[0]:
                try:
                    guard.get(earlier)
                except ray_errors.RayTaskError as first:
                    error = first
                    break
        if isinstance(error.cause, _GONE):  # of something that it was given
            return WorkerLost(self.name, rank, _reason(error.cause))
        cause = error.cause if isinstance(error.cause, BaseException) else RuntimeError(str(error))
        cause = numerics.user_error(cause) or cause
        cause.add_note(f"in {self.name} rank {rank}")
        cause.__cause__ = None
        cause.add_note(str(error))
        return cause

    def work(self, method: str) -> Work:
        """Calls of ``method`` on whichever worker is free, to which items are added one by one."""
        return Work(self, method)

    def wait_any(self, running: Mapping[ray.ObjectRef, tuple[WorkerGroup, int]]) -> ray.ObjectRef:
        """The first that is there of calls to ranks of this and other groups; one that was replaced may take as long as
        a start.

        Raises:
            Hung: none came in ``runner.hang_timeout``.
        """
        watch, starting = self._session.watch, not all(group._has_adopted(rank) for group, rank in running.values())
        patience = watch.starting(self._session.config.start_timeout) if starting else nullcontext()
        with patience:
            return watch.wait_one(list(running), lambda ref: _name(running[ref]))

    def look(self) -> None:
        """What every wait looks at, now."""
        self._session.watch.look()


def results_of(*calls: tuple[WorkerGroup, Sequence[ray.ObjectRef]]) -> list[Any]:
    """Results of calls to ranks 0, 1, ... of several groups at once; fails with the first failure among all of them."""
    source = {ref: (group, rank) for group, refs in calls for rank, ref in enumerate(refs)}
    values: dict[ray.ObjectRef, Any] = {}
    waiting = set(source)
    watch = calls[0][0]._session.watch
    while waiting:
        ref = watch.wait_one([ref for ref in source if ref in waiting], lambda ref: _name(source[ref]))
        waiting.remove(ref)
        group, rank = source[ref]
        values[ref] = group.result(ref, rank)
    return [values[ref] for ref in source]


def _ready(member: _Member) -> ray.ObjectRef:
    """A question that a process answers when it has nothing else to do, and whose error says that it is gone."""
    return guard.ask(member.handle.__ray_ready__.remote)


def _name(source: tuple[WorkerGroup, int]) -> tuple[str, int]:
    return source[0].component, source[1]


def _reason(error: BaseException) -> str:
    """The one sentence of Ray's report that says what happened, and to which process."""
    text = " ".join(str(error).split())
    process = re.search(r"pid: (\d+) .*?ip: (\S+)", text)
    where = f"process {process[1]} on {process[2]}: " if process else ""
    report = text.rpartition("exit type")[2]
    detail = re.search(r"(?:Worker exit detail:|because) (.*?)(?: Some common causes|$)", report)
    return f"{where}{(detail[1] if detail else text)[:300]}"
