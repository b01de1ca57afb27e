"""Items for whichever worker of a group is free: may grow while they are done, and outlives the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray

from rlinf_lite.cluster.errors import Hung, WorkerHung, WorkerLost
from rlinf_lite.cluster.guard import guard

if TYPE_CHECKING:
    from rlinf_lite.cluster.group import WorkerGroup


class Work:
    """Calls of one method, at most one a worker at a time.

    Where the group can mend itself, a worker that is lost, or hangs, is replaced, and what it had in hand is done
    again.
    """

    def __init__(self, group: WorkerGroup, method: str) -> None:
        self._group, self._method = group, method
        self._queue: deque[tuple[Any, Any]] = deque()
        self._running: dict[ray.ObjectRef, tuple[Any, Any, int]] = {}
        self._done: deque[tuple[Any, Any]] = deque()

    def add(self, key: Any, item: Any) -> None:
        """One more. Does not wait; begins at once if a worker is free."""
        self._queue.append((key, item))
        if len(self._running) == self._group.size:
            ended, _ = guard.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for ref in ended:
                self._take(ref)
        self._feed()

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """As `results`."""
        return self.results()

    def results(self, *, beside: Sequence[Work] = ()) -> Iterator[tuple[Any, Any]]:
        """(key, result) of all that was added, as they finish.

        Args:
            beside: work that goes on meanwhile: whoever becomes free gets the next of it.

        Raises:
            WorkerLost: a worker is gone or hangs, and the group cannot mend itself.
            Exception: whatever the method raised, with the rank in its notes.
        """
        while self._running or self._done:
            if not self._done:
                _wait([self, *beside])
            while self._done:
                yield self._done.popleft()

    def _feed(self) -> None:
        busy = {rank for *_, rank in self._running.values()}
        free = [rank for rank in range(self._group.size) if rank not in busy]
        if self._queue and free:
            self._group.look()
        for rank in free[: len(self._queue)]:
            key, item = self._queue.popleft()
            self._running[self._group.start_one(rank, self._method, item)] = (key, item, rank)

    def _take(self, ref: ray.ObjectRef) -> None:
        """What a call that has ended came to."""
        try:
            value = self._group.result(ref, self._running[ref][2])
        except WorkerLost as lost:
            self._again(ref, lost)
        else:
            key, *_ = self._running.pop(ref)
            self._done.append((key, value))

    def _again(self, ref: ray.ObjectRef, lost: WorkerLost) -> None:
        key, item, rank = self._running.pop(ref)
        if self._group.mend is None or not (isinstance(lost, WorkerHung) or self._group.is_gone(rank)):
            raise lost  # it lives: what it was given was lost with somebody else
        self._queue.appendleft((key, item))
        self._group.mend(lost)


def _wait(works: Sequence[Work]) -> None:
    """Until one call of any of them has ended, or all that hang were begun again."""
    source = {ref: (work, rank) for work in works for ref, (*_, rank) in work._running.items()}
    try:
        ended = works[0]._group.wait_any({ref: (work._group, rank) for ref, (work, rank) in source.items()})
    except Hung as hung:
        for ref, (work, rank) in source.items():
            work._again(ref, WorkerHung(work._group.name, rank, hung.seconds))
    else:
        source[ended][0]._take(ended)
    for work in works:
        work._feed()
