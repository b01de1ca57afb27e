"""Publishing the policy's weights to the rollout workers, by one of four transports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.group import Call, wait_all, wait_for_collective
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.workers.policy import PolicyWorkers
from rlinf_lite.cluster.workers.rollout import RolloutWorkers
from rlinf_lite.errors import ConfigError
from rlinf_lite.observability import log_line

if TYPE_CHECKING:  # imports torch, which the driver does later
    from rlinf_lite.weights.checksum import Checksums


class WeightSync(Protocol):
    """Brings the weights of an update to the next rollout."""

    def start(self, step: int, num_ahead: int) -> Arriving | None:
        """Begin the next `publish`, where that can be done beside other work.

        Called when the policy's ranks were asked for the last update of a step: what this asks of them comes after it.
        Does not wait; that `publish` raises what goes wrong.

        Args:
            num_ahead: so many engines, the first ones, are asked for responses at once, which are compared as
                `Arriving` says. That `publish` compares the weights of the others only.

        Returns:
            None if nothing was begun.
        """

    def publish(self, step: int) -> None:
        """Return when every engine holds the policy's current weights. Called at the top of a step.

        Engines that were asked for responses ahead may still be loading them; see `start` for how these are compared.

        Args:
            step: completed steps of the weights.

        Raises:
            WeightsDiffer: the checksums of an engine's weights are not those of what the policy sent.
        """

    def send_to(self, rank: int) -> None:
        """Send the weights of the last `publish` to a rollout worker that was replaced since. Does not wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arriving:
    """Weights that are on their way to the engines, which generate with them before anything has compared them."""

    step: int
    """Completed steps of the weights."""
    arrived: Sequence[Sequence[Call[Any]] | None]
    """Of each engine that may begin: the calls that succeed when it holds the weights; None: the ranks tell it."""
    sums: Sequence[Call[Checksums]]
    """Of each policy rank: the checksums of what it sent."""

    def compare(self, who: str, held: Mapping[str, int] | None) -> None:
        """Compare the weights that an engine generated with. Waits for `sums`.

        Args:
            who: the engine, for the message.
            held: their checksums; None: it cannot say.

        Raises:
            WeightsDiffer: they are not those that the policy sent.
        """
        if held is not None:
            from rlinf_lite.weights.checksum import require_equal  # imports torch, which the driver does later

            require_equal(who, self.step, wait_all(self.sums), held)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    """Calls that bring weights from the policy to the engines."""

    step: int
    """Completed steps of the weights."""
    arrived: list[list[Call[Any]] | None]
    """By engine, as `Arriving.arrived`."""
    sums: list[Call[Checksums]]
    """What `checks` compare with."""
    sent: list[Call[Any]]
    """What the policy's ranks do."""
    received: list[Call[None]]
    """What the engines do before they compare."""
    checks: list[Call[None]]
    """An engine compares its weights with what was sent."""


class ObjectStoreSync:
    """Each policy rank puts its own rows into Ray's object store; each engine maps all of them and copies them once.

    No rank ever holds the whole model, and on one node nothing is copied twice.
    """

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str, step: int = 0) -> None:
        """
        Args:
            step: completed steps of the weights of the last `publish`.
        """
        self._policy, self._rollouts, self._precision, self._step = policy, rollouts, precision, step
        self._started: _Started | None = None

    def start(self, step: int, num_ahead: int) -> Arriving | None:
        """As `WeightSync.start`: engines are idle between two rollouts."""
        started = self._started = self._begin(step, num_ahead)
        return Arriving(step=step, arrived=started.arrived[:num_ahead], sums=started.sums)

    def _begin(self, step: int, num_ahead: int = 0) -> _Started:
        rollouts, rows = self._rollouts, self._policy.start_weight_rows(self._precision)
        loads, sums = rollouts.start_load_weights(rows), self._policy.start_row_checksums(self._precision)
        checks = [rollouts.start_check_weights_on(rank, step, sums) for rank in range(num_ahead, rollouts.size)]
        return _Started(
            step=step,
            arrived=[[load] for load in loads],
            sums=sums,
            sent=[*rows, *sums],
            received=loads,
            checks=checks,
        )

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`; repairs a rollout worker that is lost meanwhile."""
        self._step = step
        started, self._started = self._started, None
        try:
            if started is None or started.step != step:
                started = self._begin(step)
            awaited: list[Call[Any]] = [*started.sent, *started.received, *started.checks]
            wait_all(awaited)
        except Exception as error:
            if started is not None:
                wait_all(started.sent)  # a failed policy rank makes every load fail: raise its own error
            if not isinstance(error, WorkerLost) or error.group != self._rollouts.name or self._rollouts.repair is None:
                raise
            self._rollouts.repair(error)
            self.publish(step)

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`: until the next update the policy's weights are those of the last publish."""
        rows = self._policy.start_weight_rows(self._precision)
        sums = self._policy.start_row_checksums(self._precision)
        self._rollouts.require(self._rollouts.start_load_weights_on(rank, rows))
        self._rollouts.require(self._rollouts.start_check_weights_on(rank, self._step, sums))


class RegionSync(ObjectStoreSync):
    """On CPUs: each policy rank writes its own rows into one region of shared memory, with which the engines compute.

    It is for engines on the node of all policy ranks. Others, and those that cannot open it, get their weights as from
    `ObjectStoreSync`.

    Nothing is written while an engine reads: when the policy's ranks are asked to write, the driver has all that the
    engines were to generate. Of a replaced one it may not have; so then there is no region until the next `publish`,
    for which every engine opens a new one after all that it was asked before. Another `WeightSync`, as after a
    recovery, does so too.
    """

    _near: list[int] | None = None
    """Ranks of the engines that have the region; None: it is not open."""

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str, step: int = 0) -> None:
        """As `ObjectStoreSync`."""
        super().__init__(policy, rollouts, precision, step)
        self._forget()

    def _forget(self) -> None:
        """The next `publish` opens a new region."""
        self._near = None
        self._policy.write_after_updates(None)

    def start(self, step: int, num_ahead: int) -> Arriving | None:
        """As `WeightSync.start`: nothing if there is no region, since to open one is to wait."""
        return None if self._near is None else super().start(step, num_ahead)

    def _begin(self, step: int, num_ahead: int = 0) -> _Started:
        if self._near is None:
            self._near = self._open()
        policy, rollouts, near = self._policy, self._rollouts, self._near
        far = [rank for rank in range(rollouts.size) if rank not in near]
        by_update = policy.written_by_update(step)
        if by_update is not None:
            written = by_update.calls
        else:
            written = policy.start_write_region(self._precision) if near else []
        rows = policy.start_weight_rows(self._precision) if far else []
        loads = {rank: rollouts.start_load_weights_on(rank, rows) for rank in far}
        ended: Sequence[Call[Any]] = written if by_update is None else by_update.sums  # not the update's reports
        received = [rollouts.start_sum_weights_on(rank, step, ended) for rank in near if rank >= num_ahead]
        sums = policy.start_row_checksums(self._precision) if by_update is None else by_update.sums
        checks = [rollouts.start_check_weights_on(rank, step, sums) for rank in range(num_ahead, rollouts.size)]
        arrives = None if by_update is not None else written
        return _Started(
            step=step,
            arrived=[[loads[rank]] if rank in loads else arrives for rank in range(rollouts.size)],
            sums=sums,
            sent=[*written, *rows, *sums],
            received=[*received, *loads.values()],
            checks=checks,
        )

    def _open(self) -> list[int]:
        """Give the policy's ranks, and all engines that can have it, a new region; return these engines' ranks."""
        policy, rollouts = self._policy, self._rollouts
        nodes = {location.node_id for location in policy.locations()}
        near = [rank for rank, location in enumerate(rollouts.locations()) if {location.node_id} == nodes]
        far = [rank for rank in range(rollouts.size) if rank not in near]
        if far:
            _log_object_store(tuple(far), "they and all actor ranks are not on one node")
        if not near:
            return []
        layout = wait_all([rollouts.start_weight_layout_on(near[0])])[0]
        address = wait_all([policy.start_make_region(layout)])[0]
        if isinstance(address, str):
            problems: list[str | None] = [address]
        else:
            problems = wait_all(policy.start_open_region(address))
        if any(problems) or isinstance(address, str):
            _log_object_store(tuple(near), f"shared memory: actor {next(filter(None, problems))}")
            return []
        opened = wait_all([rollouts.start_open_region_on(rank, address, policy.size) for rank in near])
        for rank, bells in zip(near, opened, strict=True):
            if isinstance(bells, str):
                _log_object_store((rank,), f"shared memory: rollout {bells}")
        offered = {rank: bells for rank, bells in zip(near, opened, strict=True) if not isinstance(bells, str)}
        if offered:
            problems = wait_all(policy.start_open_bells([*offered.values()]))
            if problem := next(filter(None, problems), None):
                log_line(f"   rollout workers hear of new weights through Ray (shared memory: actor {problem})")
            else:
                policy.write_after_updates(self._precision)
        return [*offered]

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`, over the object store."""
        self._forget()
        super().send_to(rank)


@cache  # once
def _log_object_store(ranks: tuple[int, ...], reason: str) -> None:
    names = ", ".join(map(str, ranks))
    log_line(f"   weights reach rollout rank {names} through Ray's object store ({reason})")


class SharedMemorySync:
    """Each policy rank writes its own rows into the memory in which the engines keep their weights."""

    def __init__(self, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str) -> None:
        self._policy, self._rollouts, self._precision = policy, rollouts, precision
        self._is_open, self._step = False, 0

    def start(self, step: int, num_ahead: int) -> Arriving | None:
        """As `WeightSync.start`: nothing, since engines may still be asleep."""
        return None

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`; repairs a rollout worker that is lost meanwhile."""
        self._step = step
        try:
            if not self._is_open:
                shared = self._rollouts.start_share_weights()
                wait_all(shared)  # or the loss of an engine is taken for that of the rank which was to open its memory
                wait_all(self._policy.start_opening_engines(shared))
                self._is_open = True
            sums = self._policy.start_write_weights(self._precision)
            wait_all(sums)
            wait_all(self._rollouts.start_check_weights(step, sums))
        except WorkerLost as error:
            if error.group != self._rollouts.name or self._rollouts.repair is None:
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

    def start(self, step: int, num_ahead: int) -> Arriving | None:
        """As `WeightSync.start`: nothing, since a collective call cannot be given up."""
        return None

    def publish(self, step: int) -> None:
        """As `WeightSync.publish`."""
        self._step = step
        if not self._joined:
            self._join()
        received: list[Call[Any]] = [*self._rollouts.start_receiving()]
        sums = self._policy.start_broadcast(self._precision)
        wait_for_collective([*sums, *received])
        wait_all(self._rollouts.start_check_weights(step, sums))

    def _join(self) -> None:
        address = self._policy.open_channel(self._rollouts.size)
        sender = self._policy.start_joining_channel(self._rollouts.size)
        wait_for_collective([sender, *self._rollouts.start_joining_channel(address)])
        self._joined = True

    def send_to(self, rank: int) -> None:
        """As `WeightSync.send_to`, over the object store: the other workers are busy, and cannot join a new channel."""
        self._joined = False  # the next publish makes a new channel
        ObjectStoreSync(self._policy, self._rollouts, self._precision, self._step).send_to(rank)


def build_weight_sync(session: Session, policy: PolicyWorkers, rollouts: RolloutWorkers, precision: str) -> WeightSync:
    """Build the transport that ``cluster.weight_sync`` names.

    ``auto``: shared memory with the builtin engine on CPUs, and if there is but one GPU; else the object store on CPUs,
    and if actor and rollout share several GPUs; else the collective.

    Raises:
        ConfigError: shared memory was asked for between workers that have none in common, or with vLLM; or a collective
            between workers that share a GPU, which NCCL does not support.
    """
    slots, on_gpu = session.placement.slots, session.device == "cuda"
    shared, one_slot = session.placement.collocated() and on_gpu, len({*slots["actor"], *slots["rollout"]}) == 1
    shares_memory = rollouts.can_share_weights and (one_slot or not on_gpu)
    kind = session.config.weight_sync
    if kind == "auto":
        kind = "shared_memory" if shares_memory else "object_store" if shared or not on_gpu else "collective"
    if kind == "shared_memory":
        if not shares_memory:
            raise ConfigError(
                "cluster.weight_sync=shared_memory: it needs the builtin engine and, on GPUs, only one for actor and "
                "rollout workers together (cluster.component_placement); use auto"
            )
        return SharedMemorySync(policy, rollouts, precision) if on_gpu else RegionSync(policy, rollouts, precision)
    if kind == "object_store":
        return ObjectStoreSync(policy, rollouts, precision)
    if shared:
        raise ConfigError(
            "cluster.weight_sync=collective: actor and rollout share GPUs in cluster.component_placement, and NCCL "
            "needs one GPU per process; use object_store, or give them different slots"
        )
    return CollectiveSync(policy, rollouts, precision)
