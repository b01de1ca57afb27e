"""The session with Ray: joins a running cluster or starts a local one, and reserves the slots that the job runs in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray
from ray import exceptions as ray_errors
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlinf_lite.cluster.errors import ClusterError, RayLost
from rlinf_lite.cluster.forks.client import ForkServer, can_fork
from rlinf_lite.cluster.forks.environment import worker_env
from rlinf_lite.cluster.guard import guard
from rlinf_lite.cluster.joining import connect
from rlinf_lite.cluster.placement import Placement, parse, shrink
from rlinf_lite.cluster.pulse import RayPulse
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.workers.handle import WorkerHandle
from rlinf_lite.cluster.workers.host import WorkerHost, gpu_of_this_process
from rlinf_lite.config import ClusterConfig
from rlinf_lite.errors import ConfigError
from rlinf_lite.observability.notices import log_line


class Session:
    """A Ray cluster with this job's slots reserved."""

    def __init__(
        self,
        config: ClusterConfig,
        address: str,
        device: str,
        watch: Watch,
        pulse: RayPulse,
        forks: ForkServer | None = None,
        *,
        with_critic: bool = False,
        tensor_parallel_size: int = 1,
    ) -> None:
        """
        Args:
            address: where the cluster is, or ``local``.
            device: ``cpu`` or ``cuda``.
            watch: runs checks while the driver waits.
            pulse: tells whether Ray is still there.
            forks: starts the workers of a Ray of our own; None: Ray starts them itself.
            with_critic: whether the job has a critic.
            tensor_parallel_size: GPUs of each rollout engine.
        """
        self.config, self.address, self.device, self.watch, self.pulse = config, address, device, watch, pulse
        self._forks = forks if device == "cpu" else None
        slots_per_engine = tensor_parallel_size if device == "cuda" else 1
        if slots_per_engine > 1 and config.elastic:
            raise ConfigError(
                f"cluster.elastic=true: engines of rollout.tensor_parallel_size={slots_per_engine} GPUs cannot be "
                "moved to fewer slots; set it to false, or the size to 1"
            )
        self.wanted = parse(
            config.component_placement,
            _available(device),
            with_critic=with_critic,
            slots_per_engine=slots_per_engine,
        )
        """As configured."""
        self.placement = self.wanted
        """As it is now: fewer slots with ``cluster.elastic``, while nodes are missing."""
        self._group: PlacementGroup | None = None
        self._bundles: tuple[int, ...] = ()
        self._nodes: tuple[str, ...] = ()
        self._gpus: tuple[str, ...] = ()

    def preload(self, modules: Sequence[str]) -> None:
        """Have the fork server, if there is one, import what workers need beyond the usual."""
        if self._forks is not None:
            self._forks.preload(modules)

    # -- slots

    def reserve(self) -> None:
        """Reserve this job's slots on the nodes that the cluster has now, and give earlier ones back.

        Raises:
            ClusterError: there are not enough slots.
            ConfigError: fewer than ``cluster.min_actor_ranks`` ranks would be left.
        """
        if self._group is not None:
            guard.ask_head(remove_placement_group, self._group)
            self._group, self._nodes = None, ()
        self._wait_for_nodes()
        self.placement = self._fitting()
        group = self._new_group()
        table = guard.ask_head(placement_group_table, group)["bundles_to_node_id"]
        nodes = guard.ask_head(ray.nodes)
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
        # Node by node, so that neighbouring slots, and after a restart the same ones, share a node.
        order = sorted(range(len(table)), key=lambda index: (addresses[table[index]], table[index], index))
        self._group, self._bundles = group, tuple(order)
        self._nodes = tuple(table[index] for index in order)
        if self.placement.slots_per_engine > 1:
            self._check_engines(addresses)
            self._gpus = self._find_gpus()

    def _check_engines(self, addresses: Mapping[str, str]) -> None:
        """Raises ConfigError: an engine's slots are on several nodes."""
        for slots in self.placement.workers("rollout"):
            if len(nodes := list(dict.fromkeys(map(self.node_of_slot, slots)))) > 1:
                raise ConfigError(
                    f"cluster.component_placement: the rollout engine in slots {', '.join(map(str, slots))} would be "
                    f"spread over the nodes {', '.join(addresses[node] for node in nodes)}, and "
                    f"rollout.tensor_parallel_size={len(slots)} needs GPUs of one node; choose slots, or a size, that "
                    "divide each node's GPUs"
                )

    def _find_gpus(self) -> tuple[str, ...]:
        """Ask for the GPU of each used slot, as CUDA_VISIBLE_DEVICES on its node names it; no worker holds it yet."""
        ask = ray.remote(gpu_of_this_process)
        asked = [
            guard.ask(
                ask.options(num_cpus=0, num_gpus=0.01, scheduling_strategy=self._in_bundle(slot), max_retries=0).remote
            )
            for slot in self.placement.used
        ]
        return tuple(guard.get(ref) for ref in asked)

    def _wait_for_nodes(self) -> None:
        config = self.config
        seconds = config.elastic_timeout if config.elastic else config.start_timeout
        deadline = time.monotonic() + seconds
        while (alive := sum(node["Alive"] for node in guard.ask_head(ray.nodes))) < config.num_nodes:
            self.watch.look()
            if time.monotonic() > deadline:
                if config.elastic:
                    return
                raise ClusterError(
                    f"cluster.num_nodes={config.num_nodes}, but {alive} joined within {seconds} s; "
                    "run ray start --address=... on the others, or lower it"
                )
            time.sleep(0.5)

    def _fitting(self) -> Placement:
        """Return the configured placement; with ``cluster.elastic`` as much of it as the living nodes have room for."""
        need, there = len(self.wanted.used), _slots(self.config, self.device)
        if not self.config.elastic or there >= need:
            return self.wanted
        fitting = shrink(self.wanted, there, self.config.min_actor_ranks)
        ranks, wanted = len(fitting.slots["actor"]), len(self.wanted.slots["actor"])
        log_line(
            f"!! cluster.elastic: {there} of {need} slots are there: continuing with {ranks} of {wanted} actor ranks"
        )
        return fitting

    def _new_group(self) -> PlacementGroup:
        config, need = self.config, len(self.placement.used)
        bundle = {"CPU": float(config.threads_per_worker)} | ({"GPU": 1.0} if self.device == "cuda" else {})
        have = guard.ask_head(ray.cluster_resources)
        for name, amount in bundle.items():
            if have.get(name, 0) < amount * need:
                raise ClusterError(
                    f"cluster.component_placement uses {need} slots of {amount:g} {name} each, the cluster has "
                    f"{have.get(name, 0):g} {name}; use fewer slots or add nodes"
                )
        group: PlacementGroup = guard.ask_head(placement_group, [bundle] * need, strategy="PACK")
        deadline = time.monotonic() + config.start_timeout
        if not guard.ask_head(group.wait, 5):
            log_line(
                f"waiting for {need} free slots in the cluster (at most cluster.start_timeout={config.start_timeout} s)"
            )
        while not guard.ask_head(group.wait, 0.5):
            self.watch.look()
            if time.monotonic() > deadline:
                guard.ask_head(remove_placement_group, group)
                raise ClusterError(
                    f"the cluster has the {need} slots of cluster.component_placement, but other jobs hold them "
                    f"(waited cluster.start_timeout={config.start_timeout} s); free them or wait longer"
                )
        return group

    def release(self) -> None:
        """Give the slots back at the end. Neither waits nor raises if Ray is gone.

        Ray takes them back by itself when the driver ends.
        """
        if self._group is not None and guard.head_is_there:
            with suppress(RayLost, ray_errors.RayError):
                guard.ask(remove_placement_group, self._group)
        self._group, self._nodes = None, ()

    @property
    def _held(self) -> PlacementGroup:
        assert self._group is not None
        return self._group

    @property
    def can_grow(self) -> bool:
        """Whether slots that were missing when `reserve` was called are free now."""
        missing = len(self.wanted.used) - len(self.placement.used)
        if missing == 0 or _slots(self.config, self.device) < len(self.wanted.used):
            return False
        free: float = guard.ask_head(ray.available_resources).get("GPU" if self.device == "cuda" else "CPU", 0)
        return free >= missing * (1 if self.device == "cuda" else self.config.threads_per_worker)

    @property
    def nodes(self) -> frozenset[str]:
        """Ids of the nodes on which this job has slots."""
        return frozenset(self._nodes)

    def node_of_slot(self, slot: int) -> str:
        """Return the id of the node of a slot."""
        return self._nodes[self.placement.used.index(slot)]

    def slot_of_node(self) -> dict[str, int]:
        """Return one slot of each node, by the node's id."""
        return {self.node_of_slot(slot): slot for slot in reversed(self.placement.used)}

    # -- processes

    def start_process(self, name: str, component: str, slots: Sequence[int], *args: Any) -> WorkerHandle:
        """Start a `WorkerHost` in the first of ``slots``, with the GPUs of all; does not wait until it is up.

        Args:
            name: shown by `ps` and `ray list actors`.
            args: for `WorkerHost`.
        """
        host: Any = ray.remote(type(name, (WorkerHost,), {})).options(
            num_cpus=0,
            num_gpus=self._gpu_share(component, slots[0]),
            scheduling_strategy=self._in_bundle(slots[0]),
            runtime_env=self._runtime_env(slots),
            enable_task_events=False,
        )
        return WorkerHandle(guard.ask(host.remote, *args))

    def _in_bundle(self, slot: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._held, self._bundles[self.placement.used.index(slot)])

    def _visible_gpus(self, slots: Sequence[int]) -> dict[str, str]:
        """Environment of a worker with several GPUs: Ray gives it that of one slot. The others are reserved too."""
        if len(slots) == 1:
            return {}
        gpus = [self._gpus[self.placement.used.index(slot)] for slot in slots]
        return {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}

    def _runtime_env(self, slots: Sequence[int]) -> dict[str, Any] | None:
        """Return what Ray has to do to start a worker; None if it does so for every worker."""
        if self._forks is not None and self._forks.starts_all_workers:
            return None
        env: dict[str, Any] = {
            "env_vars": worker_env(self.config.threads_per_worker, self.device) | self._visible_gpus(slots)
        }
        return env if self._forks is None else env | {"py_executable": self._forks.python}

    def _gpu_share(self, component: str, slot: int) -> float:
        """Return the fraction of the slot's GPU that a worker of ``component`` gets."""
        if self.device == "cpu" or component == "reward":
            return 0.0
        return 1.0 / self.placement.sharers(slot)


@contextmanager
def _fork_server(config: ClusterConfig, early: ForkServer | None) -> Iterator[ForkServer | None]:
    """A server that imports libraries while Ray starts; None where workers cannot be forked.

    Args:
        early: one that was started before the config was known; it is used if its workers' environment is right.
    """
    forks, environment = early, worker_env(config.threads_per_worker, "cpu")
    if forks is not None and (not can_fork(config.device) or forks.environment != environment):
        forks.close()
        forks = None
    if forks is None and can_fork(config.device):
        forks = ForkServer(environment)
    try:
        yield forks
    finally:
        if forks is not None:
            forks.close()


@contextmanager
def open_session(
    config: ClusterConfig,
    watch: Watch,
    rejoin: str | None = None,
    forks: ForkServer | None = None,
    *,
    with_critic: bool = False,
    tensor_parallel_size: int = 1,
) -> Iterator[Session]:
    """Join or start Ray and reserve the slots; leave Ray and release the slots at the end.

    Args:
        rejoin: as in `connect`.
        forks: a fork server that was started before; it is closed at the end, or at once if it is of no use.
        with_critic, tensor_parallel_size: as for `Session`.

    Raises:
        ClusterError: too few nodes, GPUs or CPUs for ``cluster.component_placement``.
        ConfigError: the placement cannot be read, or has no room for the engines' GPUs.
    """
    with _fork_server(config, forks) as forks:
        address = connect(config, rejoin, forks)
        if address != "local" and forks is not None:
            forks.close()  # a cluster's nodes may have Python elsewhere
            forks = None
        try:
            pulse = _look_at_ray(watch)
            session = Session(
                *(config, address, _device(config), watch, pulse, forks),
                with_critic=with_critic,
                tensor_parallel_size=tensor_parallel_size,
            )
            session.reserve()
            try:
                yield session
            finally:
                session.release()
        finally:
            if guard.head_is_there:
                ray.shutdown()
                guard.watch(None)
            else:
                guard.abandon("its head is out of reach")


def _look_at_ray(watch: Watch) -> RayPulse:
    try:
        pulse = RayPulse()
    except (OSError, psutil.NoSuchProcess, ray_errors.RayError) as error:
        guard.abandon(f"it does not answer: {' '.join(str(error).split())[:300]}")
        guard.check()
        raise
    guard.watch(pulse, watch.look_often)
    return pulse


def _device(config: ClusterConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if guard.ask_head(ray.cluster_resources).get("GPU", 0) else "cpu"


def _available(device: str) -> int:
    return int(guard.ask_head(ray.cluster_resources).get("GPU" if device == "cuda" else "CPU", 0))


def _slots(config: ClusterConfig, device: str) -> int:
    """Count the slots of the living nodes, used ones included."""
    name, amount = ("GPU", 1.0) if device == "cuda" else ("CPU", float(config.threads_per_worker))
    return sum(int(node["Resources"].get(name, 0) // amount) for node in guard.ask_head(ray.nodes) if node["Alive"])
