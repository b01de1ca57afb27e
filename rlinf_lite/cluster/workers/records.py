"""What workers tell the driver about themselves."""

from __future__ import annotations

from dataclasses import dataclass

from rlinf_lite.cluster.stacks import Process

WeightShapes = dict[str, tuple[int, ...]]
"""Name and whole shape of every weight, in the order in which weights are published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLocation:
    """The process and node that a worker runs on."""

    process: Process
    node_id: str
    address: str
    """IP address of the node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """Where the processes of one process group meet."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySetup:
    """What a policy rank has built."""

    num_parameters: int
    tied: dict[str, str]
    """Weights that share a tensor with an earlier one: ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    compute: str
    """Devices and libraries that decide which kernels run."""
    weights: WeightShapes


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """What a rollout worker has built."""

    compute: str
    """Devices and libraries that decide which kernels run."""
    weights: WeightShapes
