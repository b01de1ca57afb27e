"""A process that keeps copies of other nodes' shards in the object store of its own node."""

from __future__ import annotations

import numpy as np
from ray import ObjectRef

from rlinf_lite.cluster.session import Session


class ReplicaHolder:
    """The remote side: holds shards of ranks on other nodes."""

    def __init__(self) -> None:
        self._shards: dict[int, dict[tuple[str, int], dict[str, np.ndarray]]] = {}

    def hold(self, step: int, worker: tuple[str, int], shard: dict[str, np.ndarray]) -> None:
        """Hold a shard, and drop those of steps before the last. A mapped shard stays in this node's object store."""
        self._shards = {held: workers for held, workers in self._shards.items() if held >= step - 1}
        self._shards.setdefault(step, {})[worker] = shard


class ReplicaHolderProcess:
    """The driver's side."""

    def __init__(self, session: Session, slot: int) -> None:
        """Start the process in ``slot``; does not wait for it."""
        self._handle = session.start_process("ReplicaHolder", "reward", (slot,))
        self._handle.adopt(f"{__name__}:ReplicaHolder")

    def start_hold(
        self, step: int, worker: tuple[str, int], shard: ObjectRef[dict[str, np.ndarray]]
    ) -> ObjectRef[None]:
        """Fetch the shard of a worker (component, rank) and hold it, without waiting."""
        return self._handle.run("hold", step, worker, shard)

    def kill(self) -> None:
        """End the process."""
        self._handle.kill()
