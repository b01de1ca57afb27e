"""The ``cluster`` section: nodes, devices, worker processes and how weights travel between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le

from rlinf_lite.config.fields import Count, CountOrZero, Neutral, Seconds, Section

Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Threads: TypeAlias = Annotated[int, Ge(1), Le(1024)]


class ClusterConfig(Section):
    num_nodes: Neutral[Count] = 1
    """Number of nodes that the run waits for."""
    component_placement: Neutral[dict[str, Any]] = {}
    """Slots of each component, one process per slot: ``{"actor": "0-1", "rollout": "2,3", "reward": "0"}``. Empty: one
    slot for all. A slot is a GPU on a GPU cluster and a CPU core otherwise; ``all`` means every one of them.
    Components with the same slot share it."""
    device: Device = "auto"
    """``auto``: cuda if the cluster has GPUs, otherwise cpu."""
    threads_per_worker: Threads = 1
    """Threads of each worker process. Another number of threads gives other results."""
    deterministic: bool = True
    """Actors and the builtin engine use only kernels that torch calls deterministic. An operation without one on this
    device ends the run with its name (exit code 2). false: torch may choose kernels that sum in a varying order, so
    two equal runs, and a resumed one, may differ. For vLLM see ``rollout.batch_invariant``."""
    self_check: Neutral[bool] = True
    """Before the first step check that engine and update repeat their bits on this hardware. The builtin engine
    generates a small made-up batch twice and in another composition, the actor computes log-probs and a gradient
    twice; a line of the log gives the result, or the first operation that differs. Nothing of the run changes."""
    weight_sync: Neutral[Literal["auto", "object_store", "shared_memory", "collective"]] = "auto"
    """How weights travel from actor to rollout workers. ``object_store``: Ray's object store; ``shared_memory``: the
    actor writes into the builtin engine's own memory, which needs one GPU that both share, or on CPUs one node (engines
    on others get them through the object store); ``collective``: a broadcast over gloo or NCCL, which needs separate
    GPUs. auto: on CPUs and on one GPU shared memory (the object store for vLLM), on several GPUs the collective, unless
    actor and rollout share them."""
    object_store_memory: Neutral[Annotated[int, Ge(75 * 2**20), Le(2**50)] | None] = None
    """Bytes of the object store if this run starts Ray; null: Ray decides."""
    start_timeout: Neutral[Annotated[int, Ge(1), Le(10**8)]] = 300
    """Seconds to wait for nodes, slots and the start of workers."""
    warm_spares: Neutral[CountOrZero] = 0
    """Idle processes on each node that have finished their imports and replace a lost worker within one or two seconds
    (about 0.5 GB each). On CPUs only: a GPU worker is always a new process."""
    elastic: Neutral[bool] = False
    """Continue with fewer actor ranks if a lost node does not return, and with more when it does. With
    ``actor.training_backend=fsdp`` (``strategy: fsdp2``) no number changes."""
    min_actor_ranks: Neutral[Count] = 1
    """With ``elastic``: the run stops if fewer actor ranks than this are left."""
    elastic_timeout: Neutral[Annotated[Seconds, Ge(0)]] = 30.0
    """With ``elastic``: seconds to wait for a lost node before the run continues without it."""
