"""The state of the newest step, held in the cluster's memory, from which lost workers are restored.

On one node the object store holds it, which outlives every worker process. With several nodes a replica holder on
another node holds a second copy of each rank's shard; Ray finds that copy when the first one is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import exceptions as ray_errors

from rlinf_lite.checkpoint import DamagedCheckpoint, LoadReport
from rlinf_lite.cluster.errors import Hung, WorkerLost
from rlinf_lite.cluster.group import Call, wait_all
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.workers.replica_holder import ReplicaHolderProcess
from rlinf_lite.cluster.workers.trainer import Files, Trainers


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    step: int
    data: Mapping[str, Any]
    small: Files
    """Held by the driver, so that it is not lost with the node of rank 0."""
    shards: list[Call[Files]]
    """By rank: the policy's, then the critic's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    step: int
    small: list[Call[Files]]
    shards: list[Call[Files]]


class MemoryReplicas:
    """Holds the state of the newest completed step; while the next one is copied, of both."""

    def __init__(self, trainers: Trainers, session: Session) -> None:
        self._trainers, self._session = trainers, session
        self._held: _Held | None = None
        self._started: _Started | None = None
        self._holders: dict[str, ReplicaHolderProcess] = {}

    @property
    def step(self) -> int | None:
        """The completed step whose state is held; None if none is."""
        return None if self._held is None else self._held.step

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Let all ranks copy their state after all that they were asked before. Does not wait; `take` does."""
        small, shards = self._trainers.start_replicas(step, info)
        self._started = _Started(step=step, small=small, shards=shards)

    def take(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Hold the state of all ranks, in place of the one held before: the copy that `start` began, or a new one.

        Raises as `wait_all`.
        """
        if self._started is None or self._started.step != step:
            self.start(step, info)
        started, self._started = self._started, None
        assert started is not None
        first = wait_all(started.small)[0]
        for shard in started.shards:
            self._hold_elsewhere(step, shard)
        self._held = _Held(step=step, data=copy.deepcopy(dict(data)), small=first, shards=started.shards)

    def _hold_elsewhere(self, step: int, shard: Call[Files]) -> None:
        """Copy a shard to the node after its own, if there is another node."""
        slots = self._session.slot_of_node()
        if len(slots) == 1:
            return
        nodes = sorted(slots)
        home = self._session.node_of_slot(self._session.placement.slots[shard.group.component][shard.rank])
        node = nodes[(nodes.index(home) + 1) % len(nodes)]
        if node not in self._holders:
            self._holders[node] = ReplicaHolderProcess(self._session, slots[node])
        held = self._holders[node].start_hold(step, shard.worker, shard.ref)
        try:
            with self._session.watch.starting(self._session.config.start_timeout):
                self._session.watch.wait_one([held], lambda _: ("holder", shard.rank))
            guard.get(held)
        except (ray_errors.RayError, Hung):
            if lost := self._trainers.gone():
                raise lost[0] from None  # the shard is gone with its rank
            self._holders.pop(node).kill()  # the next step starts a new one

    def restore(self) -> tuple[LoadReport, Mapping[str, Any]] | None:
        """Load the held state into the ranks, whose number may have changed; return it with its ``data``.

        None if no state is held, or if it cannot be used: the state of the ranks is undefined then.
        """
        held, self._started = self._held, None
        if held is None:
            return None
        try:
            return self._trainers.load_replicas(held.step, held.small, held.shards), held.data
        except (DamagedCheckpoint, WorkerLost):
            # A shard that no node holds any more looks like the loss of the worker that was to read it.
            if lost := self._trainers.gone():
                raise lost[0] from None
            self._held = None
            return None

    def forget_holders(self) -> None:
        """End the replica holders, because the run moves to other nodes."""
        for holder in self._holders.values():
            holder.kill()
        self._holders.clear()
