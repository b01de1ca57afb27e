"""Publishing the actor's weights to the rollout workers: one interface, two roads."""

from __future__ import annotations

from typing import Protocol

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import WorkerGroup, results_of
from rlinf_lite.cluster.session import Session
from rlinf_lite.config import ConfigError


class WeightSync(Protocol):
    """Between an update and the next rollout."""

    def publish(self) -> None:
        """Called at the top of a step: return when every rollout engine holds the actor's current weights."""

    def bring(self, rank: int) -> None:
        """Give the weights of the last `publish` to one rollout worker that was replaced since. Does not wait."""


class ObjectStoreSync:
    """Each actor rank puts its own rows into shared memory; each rollout worker maps them all and copies them once.

    No rank ever holds the whole model, and on one node nothing is copied twice.
    """

    def __init__(self, actors: WorkerGroup, rollouts: WorkerGroup, precision: str) -> None:
        self._actors, self._rollouts, self._precision = actors, rollouts, precision

    def publish(self) -> None:
        rows = self._actors.start("weight_rows", self._precision)
        loads = self._rollouts.start("load_weights", *rows)
        try:
            self._rollouts.results(loads)
        except Exception as error:
            self._actors.results(rows)  # a failed actor fails every load: if it was one, name it
            if not isinstance(error, WorkerLost) or self._rollouts.mend is None:
                raise
            self._rollouts.mend(error)
            self.publish()

    def bring(self, rank: int) -> None:
        # Until the next update the actors' weights are those of the last publish.
        self._rollouts.prepare_one(rank, "load_weights", *self._actors.start("weight_rows", self._precision))


class CollectiveSync:
    """Weights are gathered whole, one at a time, and broadcast by actor rank 0 (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, actors: WorkerGroup, rollouts: WorkerGroup, precision: str) -> None:
        self._actors, self._rollouts, self._precision = actors, rollouts, precision
        self._joined = False

    def publish(self) -> None:
        if not self._joined:
            self._join()
        received = self._rollouts.start("receive")
        results_of((self._actors, self._actors.start("broadcast", self._precision)), (self._rollouts, received))

    def _join(self) -> None:
        actors, rollouts = self._actors, self._rollouts
        address = actors.call_one(0, "serve_channel", rollouts.size)
        joining = [actors.start_one(0, "join_channel", rollouts.size)]
        results_of((actors, joining), (rollouts, rollouts.start("join_channel", address, rollouts.size)))
        self._joined = True

    def bring(self, rank: int) -> None:
        self._joined = False  # the others are busy now: a new channel is made at the next publish
        ObjectStoreSync(self._actors, self._rollouts, self._precision).bring(rank)


def build_weight_sync(session: Session, actors: WorkerGroup, rollouts: WorkerGroup, precision: str) -> WeightSync:
    """The road that ``cluster.weight_sync`` names; ``auto``: the collective where actor and rollout have own GPUs.

    Raises:
        ConfigError: a collective was asked for between workers that share a GPU, which NCCL cannot do.
    """
    shared = session.placement.collocated() and session.device == "cuda"
    kind = session.config.weight_sync
    if kind == "auto":
        kind = "object_store" if shared or session.device == "cpu" else "collective"
    if kind == "object_store":
        return ObjectStoreSync(actors, rollouts, precision)
    if shared:
        raise ConfigError(
            "cluster.weight_sync=collective: actor and rollout share GPUs in cluster.component_placement, and NCCL "
            "needs one GPU a process; use object_store, or give them different slots"
        )
    return CollectiveSync(actors, rollouts, precision)
