"""Publishing the policy's weights to the rollout workers, by one of three transports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import Call, wait_all
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.errors import ConfigError

if TYPE_CHECKING:  # imports torch, which the driver does later
    from rlinf_lite.weights.transport import PackedWeights


class WeightSync(Protocol):
    """Brings the weights of an update to the next rollout."""

    def start(self, step: int) -> None:
        """Begin the next `publish`, where that can be done beside other work. Called when an update is done.

        Does not wait; that `publish` raises what goes wrong.
        """

    def publish(self, step: int) -> None:
        """Return when every engine holds the policy's current weights. Called at the top of a step.

        Args:
            step: completed steps of the weights.

        Raises:
            WeightsDiffer: the checksums of an engine's weights are not those of what the policy sent.
        """

    def send_to(self, rank: int) -> None:
        """Send the weights of the last `publish` to a rollout worker that was replaced since. Does not wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    """Calls that bring weights from the policy to the engines."""

    step: int
    """Completed steps of the weights."""
    rows: list[Call[PackedWeights]]
    received: list[Call[None]]
    """What the engines do with them."""


class ObjectStoreSync:
    """Each policy rank puts its own rows into shared memory; each engine maps all of them and copies them once.

    No rank ever holds the whole model, and on one node nothing is copied twice.
    """

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str, step: int = 0) -> None:
        """
        Args:
            step: completed steps of the weights of the last `publish`.
        """
        self._policy, self._rollouts, self._precision, self._step = policy, rollouts, precision, step
        self._started: _Started | None = None

    def start(self, step: int) -> None:
        """As `WeightSync.start`: engines are idle between two rollouts."""
        rows = self._policy.start_weight_rows(self._precision)
        loads, sums = self._rollouts.start_load_weights(rows), self._policy.start_row_checksums(self._precision)
        checks = self._rollouts.start_check_weights(step, sums)
        self._started = _Started(step=step, rows=rows, received=[*loads, *checks])

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`; repairs a rollout worker that is lost meanwhile."""
        self._step = step
        if self._started is None or self._started.step != step:
            self.start(step)
        started, self._started = self._started, None
        assert started is not None
        rows = started.rows
        try:
            wait_all(started.received)
        except Exception as error:
            wait_all(rows)  # a failed policy rank makes every load fail: raise its own error
            if not isinstance(error, WorkerLost) or self._rollouts.repair is None:
                raise
            self._rollouts.repair(error)
            self.publish(step)

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`: until the next update the policy's weights are those of the last publish."""
        rows = self._policy.start_weight_rows(self._precision)
        sums = self._policy.start_row_checksums(self._precision)
        self._rollouts.require(self._rollouts.start_load_weights_on(rank, rows))
        self._rollouts.require(self._rollouts.start_check_weights_on(rank, self._step, sums))


class SharedMemorySync:
    """Each policy rank writes its own rows into the memory in which the engines keep their weights."""

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str) -> None:
        self._policy, self._rollouts, self._precision = policy, rollouts, precision
        self._is_open, self._step = False, 0

    def start(self, step: int) -> None:
        """As `WeightSync.start`: nothing, since engines may still be asleep."""

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`; repairs a rollout worker that is lost meanwhile."""
        self._step = step
        try:
            if not self._is_open:
                wait_all(self._policy.start_opening_engines(self._rollouts.start_share_weights()))
                self._is_open = True
            sums = self._policy.start_write_weights(self._precision)
            wait_all(sums)
            wait_all(self._rollouts.start_check_weights(step, sums))
        except WorkerLost as error:
            if self._rollouts.repair is None:
                raise
            self._is_open = False
            self._rollouts.repair(error)
            self.publish(step)

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`, over the object store: the other engines are busy."""
        self._is_open = False
        ObjectStoreSync(self._policy, self._rollouts, self._precision, self._step).send_to(rank)


class CollectiveSync:
    """Weights are gathered whole, one at a time, and broadcast by policy rank 0: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str) -> None:
        self._policy, self._rollouts, self._precision = policy, rollouts, precision
        self._joined, self._step = False, 0

    def start(self, step: int) -> None:
        """As `WeightSync.start`: nothing, since a collective call cannot be given up."""

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`."""
        self._step = step
        if not self._joined:
            self._join()
        received: list[Call[Any]] = [*self._rollouts.start_receiving()]
        sums = self._policy.start_broadcast(self._precision)
        wait_all([*sums, *received])
        wait_all(self._rollouts.start_check_weights(step, sums))

    def _join(self) -> None:
        address = self._policy.open_channel(self._rollouts.size)
        sender = self._policy.start_joining_channel(self._rollouts.size)
        wait_all([sender, *self._rollouts.start_joining_channel(address)])
        self._joined = True

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`, over the object store: the other workers are busy, and cannot join a new channel."""
        self._joined = False  # the next publish makes a new channel
        ObjectStoreSync(self._policy, self._rollouts, self._precision, self._step).send_to(rank)


def build_weight_sync(session: Session, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str) -> WeightSync:
    """Build the transport that ``cluster.weight_sync`` names.

    ``auto``: on GPUs shared memory if there is but one, the object store if actor and rollout share several, else the
    collective; on a CPU the object store.

    Raises:
        ConfigError: shared memory was asked for between workers that have none in common, or with vLLM; or a collective
            between workers that share a GPU, which NCCL does not support.
    """
    slots, on_gpu = session.placement.slots, session.device == "cuda"
    shared, one_slot = session.placement.collocated() and on_gpu, len({*slots["actor"], *slots["rollout"]}) == 1
    kind = session.config.weight_sync
    if kind == "auto":
        if on_gpu and one_slot and rollouts.can_share_weights:
            kind = "shared_memory"
        else:
            kind = "object_store" if shared or not on_gpu else "collective"
    if kind == "shared_memory":
        if not (on_gpu and one_slot and rollouts.can_share_weights):
            raise ConfigError(
                "cluster.weight_sync=shared_memory: it needs the builtin engine, and one GPU for actor and rollout "
                "workers together (cluster.component_placement); use auto"
            )
        return SharedMemorySync(policy, rollouts, precision)
    if kind == "object_store":
        return ObjectStoreSync(policy, rollouts, precision)
    if shared:
        raise ConfigError(
            "cluster.weight_sync=collective: actor and rollout share GPUs in cluster.component_placement, and NCCL "
            "needs one GPU per process; use object_store, or give them different slots"
        )
    return CollectiveSync(policy, rollouts, precision)
