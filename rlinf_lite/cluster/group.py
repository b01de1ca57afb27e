"""A group of workers of one class: started in the job's slots, called together, replaced one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray import ObjectRef
from ray import exceptions as ray_errors

from rlinf_lite.cluster.errors import RayLost, WorkerLost, is_broken_connection
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.ray_failures import LOST, cause_of, worker_lost
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.workers.handle import WorkerHandle
from rlinf_lite.cluster.workers.records import WorkerLocation
from rlinf_lite.observability import log_line

T = TypeVar("T")

DEAD_SECONDS = 2.0
"""Ray reports a dead process within this time; a process that is only busy does not answer."""
_COLLECTIVE_SECONDS = 5.0
"""Gloo reports within this time that another process is gone; NCCL does after minutes."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A method call that one rank was given: a future for its result."""

    group: WorkerGroup
    rank: int
    ref: ObjectRef[T]
    handle: WorkerHandle
    """Of the process that was called."""

    @property
    def is_current(self) -> bool:
        """Whether the process that was called is still that rank."""
        members = self.group._members
        return self.rank < len(members) and members[self.rank].handle is self.handle

    @property
    def is_done(self) -> bool:
        """Whether it has returned or failed."""
        return bool(guard.wait([self.ref], timeout=0)[0])

    @property
    def worker(self) -> tuple[str, int]:
        """(component, rank)."""
        return self.group.component, self.rank

    def result(self) -> T:
        """Return the result of a call that is done; raises as `wait_all`."""
        return self.group.result(self)


@dataclass(kw_only=True, slots=True)
class _Member:
    """The process that is rank r now."""

    handle: WorkerHandle
    adopted: Call[WorkerLocation]
    required: list[Call[Any]]
    """Calls whose success its later results depend on."""
    has_started: bool = False
    """Whether ``adopted`` was seen to be done: each question of it is a call to Ray."""
    ping: ObjectRef[Any] | None = None
    """What `WorkerGroup.check` has asked it; None if it has answered."""


class WorkerGroup:
    """Workers of one class, rank 0 first. Rank r runs in slots ``workers(component)[r]`` of the session's placement."""

    def __init__(self, name: str, component: str, target: str, session: Session, spares: Spares, *args: Any) -> None:
        """Start ``target(rank, num_ranks, *args)`` in each slot of ``component``; does not wait for the processes.

        Args:
            name: for messages, and for process lists.
            target: ``"module:Class"``.
        """
        self.name, self.component = name, component
        self._target, self._session, self._spares, self._args = target, session, spares, args
        self.repair: Callable[[WorkerLost], None] | None = None
        """Called when a worker is lost whose work can be done again: must `replace` the worker and set it up, or raise.
        None: losing a worker is an error."""
        self._members: list[_Member] = []
        self.respawn()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._members)

    @property
    def slots(self) -> set[int]:
        """GPUs, or cores on a CPU cluster, that its workers have."""
        return {slot for slots in self._session.placement.workers(self.component) for slot in slots}

    # -- processes

    def respawn(self) -> None:
        """End all processes and start new ones, as many as the session's placement has slots for."""
        self.kill()
        size = len(self._session.placement.workers(self.component))
        self._members = [self._spawn(rank, size) for rank in range(size)]

    def replace(self, rank: int) -> None:
        """Give a rank a new process, a spare if there is one, and end the old one if it is still alive."""
        old, self._members[rank] = self._members[rank], self._spawn(rank, self.size)
        _end([old])

    def _spawn(self, rank: int, size: int) -> _Member:
        slots = self._session.placement.workers(self.component)[rank]
        handle = self._spares.take(slots[0]) or self._session.start_process(self.name, self.component, slots)
        adopted = Call(self, rank, handle.adopt(self._target, rank, size, *self._args), handle)
        return _Member(handle=handle, adopted=adopted, required=[])

    def require(self, call: Call[Any]) -> None:
        """Trust the rank's later results only if ``call``, which sets up a replaced worker, succeeds. Does not wait.

        An engine that did not receive its weights would generate from whatever was in memory.
        """
        self._members[call.rank].required.append(call)

    @property
    def unready(self) -> list[int]:
        """Ranks whose `require` calls are not known to have succeeded."""
        return [rank for rank, member in enumerate(self._members) if member.required]

    def kill(self) -> None:
        """End every process of the group."""
        for member in self._members:
            member.handle.kill()
        self._members = []

    # -- where and whether they live

    def locations(self) -> list[WorkerLocation]:
        """Return where each rank runs. Waits until all are up; raises as `wait_all`."""
        return wait_all(member.adopted for member in self._members)

    def location(self, rank: int) -> WorkerLocation | None:
        """Return where one rank runs; None if its process is not up yet, or died before it was."""
        adopted = self._members[rank].adopted
        try:
            return adopted.result() if adopted.is_done else None
        except WorkerLost:
            return None

    def check(self) -> None:
        """Raise `WorkerLost` if a rank is known to be dead, as it is after two or three calls, a second apart.

        Does not wait: a rank that is busy answers later.
        """
        asked = {}
        for rank, member in enumerate(self._members):
            member.ping = member.ping or member.handle.ping()
            asked[member.ping] = rank
        for ref in guard.wait(list(asked), num_returns=len(asked), timeout=0)[0]:
            self._members[asked[ref]].ping = None
            if (loss := self._loss(ref, asked[ref])) is not None:
                raise loss

    def gone(self, seconds: float = DEAD_SECONDS) -> list[WorkerLost]:
        """Ask every rank whether it lives, for at most ``seconds``, which busy ranks use up; return the dead ones."""
        pings = {member.handle.ping(): rank for rank, member in enumerate(self._members)}
        answered, _ = guard.wait(list(pings), num_returns=len(pings), timeout=seconds)
        return [loss for ref in answered if (loss := self._loss(ref, pings[ref])) is not None]

    def is_gone(self, rank: int) -> bool:
        """Ask whether a rank's process is dead; one that is only busy is not."""
        answered, _ = guard.wait([self._members[rank].handle.ping()], timeout=DEAD_SECONDS)
        return any(self._loss(ref, rank) is not None for ref in answered)

    def _loss(self, ref: ObjectRef[Any], rank: int) -> WorkerLost | None:
        try:
            self._get(Call(self, rank, ref, self._members[rank].handle))
        except WorkerLost as loss:
            return loss
        return None

    # -- calls

    def start_one(self, rank: int, method: str, *args: Any) -> Call[Any]:
        """Call ``method`` on one rank without waiting."""
        handle = self._members[rank].handle
        return Call(self, rank, handle.run(method, *args), handle)

    def start(self, method: str, *args: Any) -> list[Call[Any]]:
        """Call ``method`` with the same arguments on every rank without waiting."""
        return self.start_each(method, [args] * self.size)

    def start_each(self, method: str, args_of_ranks: Sequence[tuple[Any, ...]]) -> list[Call[Any]]:
        """Call ``method`` on every rank, each with its own arguments, without waiting."""
        assert len(args_of_ranks) == self.size
        self.watch.look()
        return [self.start_one(rank, method, *args) for rank, args in enumerate(args_of_ranks)]

    def start_in_two(self, method: str, *args: Any) -> tuple[list[Call[Any]], list[Call[Any]]]:
        """As `start`, for a method that returns a pair whose first half is fetched without the second."""
        return self.start_each_in_two(method, [args] * self.size)

    def start_each_in_two(
        self, method: str, args_of_ranks: Sequence[tuple[Any, ...]]
    ) -> tuple[list[Call[Any]], list[Call[Any]]]:
        """As `start_each`, for such a method."""
        firsts, seconds = [], []
        self.watch.look()
        for rank, (member, args) in enumerate(zip(self._members, args_of_ranks, strict=True)):
            first, second = member.handle.run_in_two(method, *args)
            firsts.append(Call(self, rank, first, member.handle))
            seconds.append(Call(self, rank, second, member.handle))
        return firsts, seconds

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` with the same arguments on every rank; results in rank order. Raises as `wait_all`."""
        return wait_all(self.start(method, *args))

    def failed(self, calls: Sequence[Call[Any]], seconds: float) -> list[int]:
        """Wait at most ``seconds`` for ``calls``; return the ranks whose call failed or did not finish."""
        waiting = {call.ref: call for call in calls}
        failed, deadline = [], time.monotonic() + seconds
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ref in guard.wait(list(waiting), timeout=left)[0]:
                call = waiting.pop(ref)
                failed += [] if _succeeded(call) else [call.rank]
        return sorted(failed + [call.rank for call in waiting.values()])

    def result(self, call: Call[T]) -> T:
        """Return the result of a call that is done, if all that the rank's results depend on has succeeded too."""
        value, member = self._get(call), self._members[call.rank]
        required = [] if call is member.adopted else member.required  # where a process runs does not depend on it
        while required:
            self._get(required[0])
            required.pop(0)
        return value

    def _get(self, call: Call[T]) -> T:
        try:
            return guard.get(call.ref)
        except ray_errors.RayTaskError as error:
            error = self._first_error(call, error)
            if isinstance(error.cause, LOST):  # an argument of the call was lost with another process
                raise worker_lost(error.cause, self.name, call.rank) from None
            raise cause_of(error, f"{self.name} rank {call.rank}") from None
        except LOST as error:
            raise worker_lost(error, self.name, call.rank) from None

    def _first_error(self, call: Call[Any], error: ray_errors.RayTaskError) -> ray_errors.RayTaskError:
        """Return why the worker could not be set up, if it could not: that explains why the call failed."""
        member = self._members[call.rank]
        for earlier in (member.adopted, *member.required):
            if earlier.ref is not call.ref and earlier.is_done:
                try:
                    guard.get(earlier.ref)
                except ray_errors.RayTaskError as first:
                    return first
        return error

    def waiting(self, rank: int) -> AbstractContextManager[None]:
        """Within: the hang timeout is at least ``cluster.start_timeout`` if the rank's process is still starting."""
        member = self._members[rank]
        member.has_started = member.has_started or member.adopted.is_done
        if member.has_started:
            return nullcontext()
        return self._session.watch.starting(self._session.config.start_timeout)

    @property
    def watch(self) -> Watch:
        """Checks every wait for this group."""
        return self._session.watch


def wait_any(calls: Sequence[Call[T]]) -> Call[T]:
    """Wait until one of ``calls``, to any ranks of any groups, has returned or failed.

    Raises:
        Hung: none has within ``runner.hang_timeout``; a process that is still starting has ``cluster.start_timeout``.
    """
    by_ref = {call.ref: call for call in calls}
    with ExitStack() as stack:
        for call in calls:
            stack.enter_context(call.group.waiting(call.rank))
        return by_ref[calls[0].group.watch.wait_one(list(by_ref), lambda ref: by_ref[ref].worker)]


def wait_all(calls: Iterable[Call[T]]) -> list[T]:
    """Wait for calls to any ranks of any groups; return their results in the order of ``calls``.

    Raises:
        WorkerLost: a rank is gone.
        Hung: as `wait_any`.
        Exception: whatever the method raised on the first rank that failed, with the rank in its notes. The others are
            not waited for: they may be waiting for the rank that failed.
    """
    in_order = list(calls)
    waiting = {call.ref: call for call in in_order}
    results: dict[ObjectRef[T], T] = {}
    while waiting:
        first = wait_any([*waiting.values()])
        # With the others that are done by now: one by one, the waits would cost the square of the number of calls.
        done = [first.ref] if len(waiting) == 1 else guard.wait([*waiting], num_returns=len(waiting), timeout=0)[0]
        for ref in done or [first.ref]:
            results[ref] = waiting.pop(ref).result()
    return [results[call.ref] for call in in_order]


def wait_all_lists(lists: Iterable[Sequence[Call[T]]]) -> list[list[T]]:
    """As `wait_all`, but for several lists of calls, with a list of results for each.

    They must not be waited for one after the other: ranks of the first may wait for a dead rank of the second, in a
    save that is in flight, and then its death would not be noticed.
    """
    in_order = [list(calls) for calls in lists]
    results = iter(wait_all(call for calls in in_order for call in calls))
    return [[next(results) for _ in calls] for calls in in_order]


def wait_for_collective(calls: Sequence[Call[Any]]) -> None:
    """As `wait_all`, for calls that wait for each other: if a worker is lost, the others may never return.

    Workers of calls that have not returned some seconds later are ended, and count as lost with the first.
    """
    try:
        wait_all(calls)
    except Exception as error:
        if isinstance(error, WorkerLost) or is_broken_connection(error):
            _end_unfinished(calls)
        raise


def _end_unfinished(calls: Sequence[Call[Any]]) -> None:
    waiting = {call.ref: call for call in calls}
    _, unfinished = guard.wait(list(waiting), num_returns=len(waiting), timeout=_COLLECTIVE_SECONDS)
    stuck = [waiting[ref] for ref in unfinished]
    if stuck:
        log_line(
            f"   ended, because they wait in a collective: {', '.join(f'{c.group.name} rank {c.rank}' for c in stuck)}"
        )
    _end([call.group._members[call.rank] for call in stuck])


def _end(members: Sequence[_Member]) -> None:
    for member in members:
        member.handle.kill()
    pings = [member.handle.ping() for member in members]
    guard.wait(pings, num_returns=len(pings), timeout=DEAD_SECONDS)


def _succeeded(call: Call[Any]) -> bool:
    try:
        call.result()
    except RayLost:
        raise
    except Exception:  # of whatever kind: the process is not used any more
        return False
    return True
