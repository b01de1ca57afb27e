"""The remote side of `PolicyWorkers`: one rank of the policy, with its trainer and its checkpoints."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rlinf_lite import faults
from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.checkpoint import (
    Checkpointer,
    DamagedCheckpoint,
    KeepBest,
    LoadReport,
    MemoryCheckpoints,
    Retention,
    SaveError,
    SaveReport,
    flatten,
    state_digest,
)
from rlinf_lite.checkpoint import rng as rngs
from rlinf_lite.cluster.workers.device import compute_capability, fix_device
from rlinf_lite.cluster.workers.records import PolicySetup, StoreAddress
from rlinf_lite.cluster.workers.rendezvous import join_store, serve_store
from rlinf_lite.config import ActorConfig, AlgorithmConfig, CheckpointConfig, ClusterConfig
from rlinf_lite.errors import NotFinite
from rlinf_lite.models import build, hf_directory
from rlinf_lite.ties import tied_names
from rlinf_lite.training.fsdp.build import build_policy, build_reference
from rlinf_lite.training.fsdp.model import ShardedPolicy
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.training.lr import learning_rate
from rlinf_lite.training.update import UpdateReport, update
from rlinf_lite.types import RankBatch, TokenBatch
from rlinf_lite.weights.names import weight_shapes
from rlinf_lite.weights.transport import Broadcaster, PackedWeights, pack

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(kw_only=True, slots=True)
class _Parts:
    """What `setup` builds and `reset` drops: everything that shares a process group with the other ranks."""

    trainer: FsdpTrainer
    reference: ShardedPolicy | None
    checkpointer: Checkpointer
    replicas: MemoryCheckpoints


class PolicyWorker:
    """One rank of the policy."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        config: ActorConfig,
        algorithm: AlgorithmConfig,
        checkpoint: CheckpointConfig,
        cluster: ClusterConfig,
        device: str,
        search: Sequence[str],
    ) -> None:
        """
        Args:
            search: where to look for a user's algorithm.
        """
        self.rank, self.num_ranks = rank, num_ranks
        self.config, self._algorithm, self._checkpoint = config, algorithm, checkpoint
        self._loss = build_algorithm(algorithm, search).losses().policy
        self._total_updates = 0
        self.device = fix_device(cluster, device)
        self.step = 0
        """The newest step whose update has begun here, or that was loaded; used by `faults`."""
        self._store: dist.TCPStore | None = None
        self._channel_store: dist.TCPStore | None = None
        self._channel: Broadcaster | None = None
        self._parts: _Parts | None = None

    # -- setting up

    def open_store(self) -> StoreAddress:
        """Rank 0: open the store at which all ranks meet."""
        self._store, address = serve_store(self.num_ranks)
        return address

    def setup(self, address: StoreAddress, checkpoints: str, total_updates: int) -> PolicySetup:
        """Join the process group, then build, shard and fill the model."""
        store = self._store or join_store(address)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.num_ranks, timeout=_COLLECTIVE_TIMEOUT
        )
        rngs.reseed(self.config.seed, 0, self.rank)
        self._total_updates = total_updates
        trainer = self._build(checkpoints).trainer
        return PolicySetup(
            num_parameters=sum(p.numel() for p in trainer.model.parameters()),
            tied=tied_names(trainer.model),
            compute=compute_capability(self.device),
            weights=weight_shapes(trainer.model),
        )

    def _build(self, directory: str) -> _Parts:
        settings, seed = self._checkpoint, self.config.seed
        model_dir = hf_directory.resolve(self.config.model.model_path)
        mesh = init_device_mesh(self.device.type, (self.num_ranks,))
        given: dict[str, Any] = {"model_dir": model_dir, "mesh": mesh, "device": self.device}
        self._parts = _Parts(
            trainer=build_policy(self.config, self._algorithm, **given),
            reference=build_reference(self.config, self._algorithm, **given),
            checkpointer=Checkpointer(
                directory,
                seed=seed,
                keep=_retention(settings),
                staged_fraction=settings.staged_fraction,
                timeout_seconds=settings.timeout,
            ),
            replicas=MemoryCheckpoints(seed=seed, timeout_seconds=settings.timeout),
        )
        # An optimizer step changes the weights, so a save in flight must have read them by then.
        self._parts.trainer.on_before_change(self._parts.checkpointer.fence)
        return self._parts

    def reset(self) -> None:
        """Drop everything that was shared with ranks that are gone, so that `setup` can be called again."""
        self._store = self._channel_store = self._channel = None
        checkpointer = None if self._parts is None else self._parts.checkpointer
        self._parts = None
        if dist.is_initialized():
            dist.destroy_process_group()
        if checkpointer is not None:
            with suppress(SaveError, TypeError):
                checkpointer.finish()  # it must not commit after the run has gone back to an older state
        del checkpointer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _built(self) -> _Parts:
        assert self._parts is not None, "called before setup"
        return self._parts

    @property
    def trainer(self) -> FsdpTrainer:
        """Of this rank."""
        return self._built.trainer

    # -- weights for the rollout workers

    def weight_rows(self, precision: str) -> PackedWeights:
        """Return this rank's rows of every weight, for the object store."""
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        return pack(self.trainer.weights(build.DTYPES[precision]))

    def open_channel(self, num_receivers: int) -> StoreAddress:
        """Rank 0: open the store at which it meets the rollout workers that it broadcasts weights to."""
        self._channel_store, address = serve_store(1 + num_receivers)
        return address

    def join_channel(self, num_receivers: int) -> None:
        """Rank 0: return when every rollout worker has joined too."""
        assert self._channel_store is not None, "called before open_channel"
        self._channel = Broadcaster(self._channel_store, rank=0, size=1 + num_receivers, device=self.device)

    def broadcast(self, precision: str) -> None:
        """Gather each weight whole over the ranks; rank 0 broadcasts it to the rollout workers."""
        for piece in self.trainer.whole_weights(build.DTYPES[precision]):
            if self.rank == 0:
                assert self._channel is not None, "called before join_channel"
                self._channel.broadcast(piece.rows.contiguous())

    # -- training

    def forward(self, units: Sequence[TokenBatch | None], reference: bool) -> dict[int, Tensor]:
        """Compute log-probs of the policy or of the reference, as `Trainer.forward`."""
        faults.reach("actor.logprobs", step=self.step + 1, rank=self.rank)
        if not reference:
            return self.trainer.forward(units)
        assert self._built.reference is not None, "there is no KL term"
        return self._built.reference.forward(units)

    def update(self, step: int, batch: RankBatch, last: bool) -> UpdateReport:
        """Take one optimizer step; after the ``last`` one of ``step`` the state must be finite.

        Raises:
            NotFinite: the gradient or the state is not finite; nothing of this step may be saved.
        """
        self.step = step
        faults.reach("actor.update", step=step, rank=self.rank)
        lr = learning_rate(self.config.optim, int(self.trainer.num_updates), self._total_updates)
        try:
            report = update(self.trainer, batch, self._loss, lr)
            if last:
                self.trainer.check_finite()
            return report
        except NotFinite as error:
            raise NotFinite(f"step {step}: {error}") from None

    # -- checkpoints

    def save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> SaveReport:
        """Write a checkpoint and wait until it is committed."""
        return self._built.checkpointer.save(step, self.trainer.state(), data=data, info=info)

    def start_save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> float:
        """Begin a save; return the seconds that this took."""
        began = time.perf_counter()
        self._built.checkpointer.start(step, self.trainer.state(), data=data, info=info)
        return time.perf_counter() - began

    def poll_save(self) -> SaveReport | SaveError | None:
        """Return how the save in flight ended on this rank, once; None if it has not ended."""
        return _outcome(self._built.checkpointer.poll)

    def finish_save(self) -> SaveReport | SaveError | None:
        """Wait for the save in flight, then as `poll_save`; None also if its end was reported before."""
        return _outcome(self._built.checkpointer.finish)

    def load(self, path: str, verify: str) -> LoadReport:
        """Load a checkpoint.

        Raises:
            CheckpointError: it does not verify, or holds a state from which no run can continue.
        """
        report = self._built.checkpointer.load(path, self.trainer.state(), verify=verify)
        self._check_loaded(path, self.trainer.bad_state())
        self.step = report.manifest.step
        return report

    def load_weights(self, path: str, verify: str) -> LoadReport:
        """Load only the model of a checkpoint; optimizer state, counters and RNG state stay as they are."""
        model = {"model": self.trainer.state()["model"]}
        report = self._built.checkpointer.load(path, model, verify=verify, whole=False)
        self._check_loaded(path, self.trainer.bad_state(weights_only=True))
        return report

    def replicate(
        self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the state as files in memory: the small ones, which rank 0 writes, and this rank's shard."""
        replica = self._built.replicas.take(step, self.trainer.state(), data=data, info=info)
        return replica.small, replica.shard

    def load_replica(self, step: int, *files: Mapping[str, np.ndarray]) -> LoadReport:
        """Load a state that `replicate` returned.

        Raises:
            CheckpointError: as `load`.
        """
        merged = {name: data for part in files for name, data in part.items()}
        report = self._built.replicas.load(step, merged, self.trainer.state())
        self._check_loaded(f"(memory) step {step}", self.trainer.bad_state())
        self.step = step
        return report

    def _check_loaded(self, path: str, problem: str | None) -> None:
        # No collective call follows, so one rank alone may raise.
        if problem is not None:
            raise DamagedCheckpoint(f"{path}: {problem} (rank {self.rank}): no run can continue from it")

    # -- facts

    def state_digest(self) -> str:
        """Return the sha256 of parameters, optimizer state and counters. Collective."""
        return state_digest(flatten(self.trainer.state()))

    def memory(self) -> float:
        """Return peak memory in GB: of the GPU, or resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _outcome(ask: Callable[[], SaveReport | None]) -> SaveReport | SaveError | None:
    # Returned, not raised: a call to all ranks ends with the first that raises, and each rank reports an end only once.
    try:
        return ask()
    except SaveError as error:
        return error


def _retention(config: CheckpointConfig) -> Retention:
    best = config.keep_best
    return Retention(
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_best=KeepBest(metric=best.metric, mode=best.mode, n=best.n) if best.metric is not None else None,
    )
