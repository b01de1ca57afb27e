"""Processes kept ready on every node of the run, their imports done: a lost worker's place is taken in no time."""

from __future__ import annotations

import time
from typing import Any

from ray import exceptions as ray_errors

from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session

_LOOK_SECONDS = 1.0


class Spares:
    """At most ``cluster.warm_spares`` ready processes a node."""

    def __init__(self, session: Session, *warm_up: Any) -> None:
        """None are started yet.

        Args:
            warm_up: as `Shell` takes it: what a spare does while it waits.
        """
        self._session, self._warm_up = session, warm_up
        # A worker's share of a GPU is given when its process starts, so a spare could not take it over.
        self._number = session.config.warm_spares if session.device == "cpu" else 0
        self._ready: dict[str, list[Any]] = {}
        self._next_look = 0.0

    def start(self) -> None:
        """Start what is missing: at first all, later what was taken or has died since the last call."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for node, slot in self._session.slot_of_node().items():
            ready = self._ready.setdefault(node, [])
            ready[:] = [handle for handle in ready if _lives(handle)]
            while len(ready) < self._number:
                ready.append(self._session.start_process("Spare", "reward", slot, *self._warm_up))

    def take(self, slot: int) -> Any | None:
        """A process on the node of ``slot``, already ready or sooner than a new one; None if there is none."""
        for handle in self._ready.get(self._session.node_of_slot(slot), [])[:]:
            self._ready[self._session.node_of_slot(slot)].remove(handle)
            if _lives(handle):
                return handle
        return None

    def kill(self) -> None:
        """End them all, by handle."""
        for ready in self._ready.values():
            for handle in ready:
                guard.kill(handle)
        self._ready.clear()


def _lives(handle: Any) -> bool:
    """False only if it is known to be gone: one that still imports does not answer."""
    done, _ = guard.wait([guard.ask(handle.__ray_ready__.remote)], timeout=0.02)
    try:
        for ready in done:
            guard.get(ready)
    except ray_errors.RayActorError:
        return False
    return True
