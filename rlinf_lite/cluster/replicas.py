"""The newest step's state, kept in the memory of the cluster: what a lost worker's successor starts from.

On one node Ray's object store holds it, which outlives every worker process. With several nodes a holder process on
another node holds a second copy of each rank's shard; Ray finds it when the first is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlinf_lite.checkpoint import DamagedCheckpoint, LoadReport
from rlinf_lite.cluster.errors import Hung, WorkerLost
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session


class ReplicaHolder:
    """The remote half: keeps shards of ranks on other nodes."""

    def __init__(self) -> None:
        self._shards: dict[int, dict[int, Mapping[str, np.ndarray]]] = {}

    def keep(self, step: int, rank: int, shard: Mapping[str, np.ndarray]) -> None:
        """Hold a shard: as long as it is mapped here, this node's object store does not let go of it."""
        self._shards = {kept: ranks for kept, ranks in self._shards.items() if kept >= step - 1}
        self._shards.setdefault(step, {})[rank] = shard


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    step: int
    data: Mapping[str, Any]
    small: Mapping[str, np.ndarray]
    """Held here, so that it does not go with the node of rank 0."""
    shards: list[ray.ObjectRef]
    """By rank."""


class MemoryReplicas:
    """The state of the newest completed step; while the next one is taken, of both."""

    def __init__(self, actors: WorkerGroup, session: Session) -> None:
        self._actors, self._session = actors, session
        self._held: _Held | None = None
        self._holders: dict[str, Any] = {}

    @property
    def step(self) -> int | None:
        """The completed step whose state is held."""
        return None if self._held is None else self._held.step

    def take(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Hold the state of all ranks as it is now, instead of the one before. Raises as `WorkerGroup.call`."""
        small, shards = self._actors.start_in_two("replicate", step, data, info)
        first = self._actors.results(small)[0]
        for rank, shard in enumerate(shards):
            self._keep_elsewhere(step, rank, shard)
        self._held = _Held(step=step, data=copy.deepcopy(dict(data)), small=first, shards=shards)

    def _keep_elsewhere(self, step: int, rank: int, shard: ray.ObjectRef) -> None:
        slots = self._session.slot_of_node()
        if len(slots) == 1:
            return
        nodes = sorted(slots)
        home = self._session.node_of_slot(self._session.placement.slots["actor"][rank])
        away = nodes[(nodes.index(home) + 1) % len(nodes)]
        if away not in self._holders:
            self._holders[away] = self._session.start_process("ReplicaHolder", "reward", slots[away])
            guard.ask(self._holders[away].adopt.remote, f"{__name__}:ReplicaHolder")
        kept = guard.ask(self._holders[away].run.remote, "keep", step, rank, shard)
        try:
            with self._session.watch.starting(self._session.config.start_timeout):
                self._session.watch.wait_one([kept], lambda _: ("holder", rank))
            guard.get(kept)
        except (ray.exceptions.RayError, Hung):
            if lost := self._actors.gone(0.5):
                raise lost[0] from None  # what it should have kept is gone
            guard.kill(self._holders.pop(away))  # made anew at the next step

    def restore(self) -> tuple[LoadReport, Mapping[str, Any]] | None:
        """Load what is held into the actors, which may be more or fewer by now. Returns it with its ``data``.

        None: nothing is held, or it cannot be used; the actors' state is undefined then.
        """
        held = self._held
        if held is None:
            return None
        try:
            return self._actors.results(self._start_loading(held))[0], held.data
        except (DamagedCheckpoint, WorkerLost):
            # A piece that is nowhere any more looks like the loss of the worker that was to read it.
            if lost := self._actors.gone(1.0):
                raise lost[0] from None
            self._held = None
            return None

    def _start_loading(self, held: _Held) -> list[ray.ObjectRef]:
        same = len(held.shards) == self._actors.size
        return [
            self._actors.start_one(
                rank, "load_replica", held.step, held.small, *([held.shards[rank]] if same else held.shards)
            )
            for rank in range(self._actors.size)
        ]

    def forget_holders(self) -> None:
        """The nodes are others now."""
        for holder in self._holders.values():
            guard.kill(holder)
        self._holders.clear()
