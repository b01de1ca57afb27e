"""A queue of items for whichever worker of a group is free; items of lost workers are done again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlinf_lite.cluster.errors import Hung, WorkerHung, WorkerLost
from rlinf_lite.cluster.group import Call, WorkerGroup, wait_any
from rlinf_lite.cluster.guard import guard

Key = TypeVar("Key")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Queued(Generic[Key, Item]):
    key: Key
    item: Item


class WorkQueue(Generic[Key, Item, Result]):
    """Calls of one method, at most one per worker at a time.

    If the group can be repaired, a worker that is lost or hangs is replaced, and its item is done again.
    """

    def __init__(self, group: WorkerGroup, start: Callable[[int, Item], Call[Result]]) -> None:
        """
        Args:
            start: begins the work on an item on a rank.
        """
        self._group, self._start = group, start
        self._queue: deque[_Queued[Key, Item]] = deque()
        self._running: dict[Call[Result], _Queued[Key, Item]] = {}
        self._done: deque[tuple[Key, Result]] = deque()

    def add(self, key: Key, item: Item) -> None:
        """Add an item. Does not wait; the item is begun at once if a worker is free."""
        self._queue.append(_Queued(key, item))
        if len(self._running) == self._group.size:
            by_ref = {call.ref: call for call in self._running}
            finished, _ = guard.wait(list(by_ref), num_returns=len(by_ref), timeout=0)
            for ref in finished:
                self._take(by_ref[ref])
        self._feed()

    def add_begun(self, key: Key, item: Item, call: Call[Result]) -> None:
        """Add an item that ``call`` works on already. Before any other is added: its worker is busy."""
        self._running[call] = _Queued(key, item)

    def results(self, *, beside: Sequence[WorkQueue[Any, Any, Any]] = ()) -> Iterator[tuple[Key, Result]]:
        """Yield (key, result) of every item that was added, in the order in which they finish.

        Args:
            beside: queues whose workers are given their next item meanwhile.

        Raises:
            WorkerLost: a worker is gone or hangs, and the group cannot be repaired.
            Exception: whatever the method raised, with the rank in its notes.
        """
        while self._running or self._done:
            if not self._done:
                _wait([self, *beside])
            while self._done:
                yield self._done.popleft()

    def _feed(self) -> None:
        """Give items to the workers that are free."""
        busy = {call.rank for call in self._running}
        free = [rank for rank in range(self._group.size) if rank not in busy]
        if self._queue and free:
            self._group.watch.look()
        for rank in free[: len(self._queue)]:
            queued = self._queue.popleft()
            self._running[self._start(rank, queued.item)] = queued

    def _take(self, call: Call[Result]) -> None:
        """Take the result of a call that is done, or begin its item again."""
        try:
            result = call.result()
        except WorkerLost as lost:
            self._repeat(call, lost)
        else:
            self._done.append((self._running.pop(call).key, result))

    def _repeat(self, call: Call[Result], lost: WorkerLost) -> None:
        queued = self._running.pop(call)
        if self._group.repair is None:
            raise lost
        if not isinstance(lost, WorkerHung) and not self._group.is_gone(call.rank):
            raise lost  # the worker lives: an argument of the call was lost with another process
        self._queue.appendleft(queued)
        self._group.repair(lost)


def _wait(queues: Sequence[WorkQueue[Any, Any, Any]]) -> None:
    """Wait until one call of any queue is done, or the items of all workers that hang have been begun again."""
    owner = {call: queue for queue in queues for call in queue._running}
    try:
        done = wait_any(list(owner))
    except Hung as hung:
        for call, queue in owner.items():
            queue._repeat(call, WorkerHung(call.group.name, call.rank, hung.seconds))
    else:
        owner[done]._take(done)
    for queue in queues:
        queue._feed()
