"""Spare processes: started on every node with their imports done, so that a lost worker is replaced without delay."""

from __future__ import annotations

import time
from typing import Any

from ray import exceptions as ray_errors

from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.workers.handle import WorkerHandle

_LOOK_SECONDS = 1.0
_PING_SECONDS = 0.02


class Spares:
    """At most ``cluster.warm_spares`` ready processes per node."""

    def __init__(self, session: Session, *warm_up: Any) -> None:
        """Start none yet.

        Args:
            warm_up: for `WorkerHost`: what a spare does while it waits.
        """
        self._session, self._warm_up = session, warm_up
        # A worker gets its part of a GPU when its process starts, so a spare could not take over a GPU worker.
        self._number = session.config.warm_spares if session.device == "cpu" else 0
        self._ready: dict[str, list[WorkerHandle]] = {}
        self._next_look = 0.0

    def start(self) -> None:
        """Start those that are missing: all at first, later those that were taken or have died."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for node, slot in self._session.slot_of_node().items():
            ready = [handle for handle in self._ready.get(node, []) if _lives(handle)]
            missing = self._number - len(ready)
            started = [self._session.start_process("Spare", "reward", (slot,), *self._warm_up) for _ in range(missing)]
            self._ready[node] = ready + started

    def take(self, slot: int) -> WorkerHandle | None:
        """Return a process on the node of ``slot``; None if there is none. It may still be importing."""
        ready = self._ready.get(self._session.node_of_slot(slot), [])
        while ready:
            if _lives(handle := ready.pop(0)):
                return handle
        return None

    def kill(self) -> None:
        """End them all."""
        for ready in self._ready.values():
            for handle in ready:
                handle.kill()
        self._ready.clear()


def _lives(handle: WorkerHandle) -> bool:
    """Return False only if the process is known to be dead: one that is still importing does not answer."""
    answered, _ = guard.wait([handle.ping()], timeout=_PING_SECONDS)
    try:
        for ref in answered:
            guard.get(ref)
    except ray_errors.RayActorError:
        return False
    return True
