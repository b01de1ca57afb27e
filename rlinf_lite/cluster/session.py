"""Joining the running Ray cluster, or starting a local one; and the slots that the job runs in."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

# Where the last `ray start` left the address of its cluster. Not ray.init(address="auto"): that also joins the private
# Ray of any other driver on this machine, and dies with it.
from ray._private.services import find_bootstrap_address
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rlinf_lite.cluster.errors import ClusterError
from rlinf_lite.cluster.placement import Placement, parse
from rlinf_lite.config import ClusterConfig
from rlinf_lite.observability.notices import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A joined cluster with this job's slots reserved."""

    address: str
    """Where the cluster is, or ``local``."""
    device: str
    """``cpu`` or ``cuda``."""
    placement: Placement
    group: PlacementGroup
    bundles: tuple[int, ...]
    """The group's bundles node by node, so that neighbouring slots, and after a restart the same ones, share a node."""
    config: ClusterConfig

    def bundle(self, slot: int) -> int:
        """Index of a slot's bundle in the placement group."""
        return self.bundles[self.placement.used.index(slot)]

    def gpu_share(self, component: str, slot: int) -> float:
        """What part of the slot's GPU a worker of ``component`` gets."""
        if self.device == "cpu" or component == "reward":
            return 0.0
        return 1.0 / self.placement.sharers(slot)

    def worker_env(self) -> dict[str, str]:
        """Environment of every worker process; read by libraries when they are imported, so it must be there before."""
        threads = str(self.config.threads_per_worker)
        env = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
        }
        if self.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        else:
            env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may choose other sums from run to run
        return env


@contextmanager
def open_session(config: ClusterConfig) -> Iterator[Session]:
    """Join (or start) Ray and reserve the slots; give both back at the end.

    Raises:
        ClusterError: too few nodes, GPUs or CPUs for ``cluster.component_placement``.
        ConfigError: the placement cannot be read.
    """
    address = _connect(config)
    try:
        _wait_for_nodes(config)
        device = _device(config)
        placement = parse(config.component_placement, _available(device))
        group = _reserve(config, device, placement)
        try:
            yield Session(
                address=address,
                device=device,
                placement=placement,
                group=group,
                bundles=_by_node(group, len(placement.used)),
                config=config,
            )
        finally:
            remove_placement_group(group)
    finally:
        ray.shutdown()


def _connect(config: ClusterConfig) -> str:
    wanted = os.environ.get("RAY_ADDRESS", "auto")
    address = find_bootstrap_address(None) if wanted == "auto" else None if wanted == "local" else wanted
    if address is not None and _answers(address):
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
        return address
    if address is not None and wanted != "auto":
        raise ClusterError(f"RAY_ADDRESS={wanted}: no Ray cluster answers there; correct it, or unset it")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, _seats(config)),
        object_store_memory=config.object_store_memory,
        include_dashboard=False,
        logging_level=logging.CRITICAL,
        log_to_driver=False,
    )
    return "local"


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself would ask a cluster that was killed for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _seats(config: ClusterConfig) -> int:
    """CPUs that the placement needs: a Ray of our own is told it has them, since slots are seats, not cores."""
    placement = parse(config.component_placement, os.cpu_count() or 1)
    return len(placement.used) * config.threads_per_worker


def _wait_for_nodes(config: ClusterConfig) -> None:
    deadline = time.monotonic() + config.start_timeout
    while (alive := sum(node["Alive"] for node in ray.nodes())) < config.num_nodes:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"cluster.num_nodes={config.num_nodes}, but {alive} joined within {config.start_timeout} s; "
                "run ray start --address=... on the others, or lower it"
            )
        time.sleep(0.5)


def _device(config: ClusterConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"


def _available(device: str) -> int:
    return int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))


def _reserve(config: ClusterConfig, device: str, placement: Placement) -> PlacementGroup:
    cpus = config.threads_per_worker
    bundle = {"CPU": float(cpus), "GPU": 1.0} if device == "cuda" else {"CPU": float(cpus)}
    have, need = ray.cluster_resources(), len(placement.used)
    for name, amount in bundle.items():
        if have.get(name, 0) < amount * need:
            raise ClusterError(
                f"cluster.component_placement uses {need} slots of {amount:g} {name} each, the cluster has "
                f"{have.get(name, 0):g} {name}; use fewer slots or add nodes"
            )
    group = placement_group([bundle] * need, strategy="PACK")
    if not group.wait(5):
        say(f"waiting for {need} free slots in the cluster (at most cluster.start_timeout={config.start_timeout} s)")
    if not group.wait(config.start_timeout):
        remove_placement_group(group)
        raise ClusterError(
            f"the cluster has the {need} slots of cluster.component_placement, but other jobs hold them "
            f"(waited cluster.start_timeout={config.start_timeout} s); free them or wait longer"
        )
    return group


def _by_node(group: PlacementGroup, num_bundles: int) -> tuple[int, ...]:
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return tuple(sorted(range(num_bundles), key=lambda index: (addresses[nodes[index]], index)))
