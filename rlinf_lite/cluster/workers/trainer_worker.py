"""The remote side of `PolicyWorkers` and `CriticWorkers`: one rank with its trainer and its checkpoints."""

from __future__ import annotations

import gc
import math
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlinf_lite import faults
from rlinf_lite import rng as rngs
from rlinf_lite.algorithms import Loss
from rlinf_lite.checkpoint import (
    Checkpointer,
    DamagedCheckpoint,
    KeepBest,
    LoadReport,
    MemoryCheckpoints,
    Retention,
    SaveError,
    SaveReport,
)
from rlinf_lite.checkpoint.file_state import FileState
from rlinf_lite.cluster.workers.device import compute_capability, fix_device
from rlinf_lite.cluster.workers.records import RankLayout, StoreAddress, TrainerSetup
from rlinf_lite.cluster.workers.rendezvous import join_store, serve_store
from rlinf_lite.config import CheckpointConfig, ClusterConfig, OptimConfig
from rlinf_lite.errors import NotFinite
from rlinf_lite.node.exchange import close_exchanges
from rlinf_lite.selfcheck.records import UpdateCheck
from rlinf_lite.selfcheck.update import check_update, update_operations
from rlinf_lite.training.full_weights import full_weights_file
from rlinf_lite.training.lr import learning_rate
from rlinf_lite.training.trainer import Trainer
from rlinf_lite.training.update import UpdateReport, update
from rlinf_lite.types import Group, RankBatch

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(kw_only=True, slots=True)
class _Parts:
    """What `setup` builds and `reset` drops: everything that shares a process group with other ranks."""

    trainer: Trainer
    checkpointer: Checkpointer
    replicas: MemoryCheckpoints


class TrainerWorker(ABC):
    """One rank of a policy or a critic.

    All ranks of both share one process group, over which checkpoints are coordinated; the ranks of each model have a
    group of their own within it.
    """

    section: ClassVar[str]
    """Of a checkpoint; also names the worker's component and its section of the config."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        optim: OptimConfig,
        loss: Loss,
        checkpoint: CheckpointConfig,
        cluster: ClusterConfig,
        *,
        seed: int,
        device: str,
        full_weights: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            rank: of this model.
            full_weights: the type in which every save also writes the whole model as one file; None: it does not.
        """
        self._full_weights = full_weights
        self.rank, self.num_ranks = rank, num_ranks
        self._optim, self._loss, self._checkpoint, self._seed = optim, loss, checkpoint, seed
        self.device = fix_device(cluster, device)
        self.step = 0
        """The newest step whose update has begun here, or that was loaded; used by `faults`."""
        self._store: dist.TCPStore | None = None
        self._parts: _Parts | None = None
        self._total_updates = 0

    @abstractmethod
    def _build_trainer(self, mesh: DeviceMesh) -> Trainer:
        """Build, shard and fill the model, over the ranks of ``mesh``."""

    # -- setting up

    def open_store(self, num_ranks: int) -> StoreAddress:
        """Open the store at which all ranks of all models meet; called on one of them."""
        self._store, address = serve_store(num_ranks)
        return address

    def setup(self, address: StoreAddress, layout: RankLayout, checkpoints: str, total_updates: int) -> TrainerSetup:
        """Join the process group, then build, shard and fill the model.

        Args:
            layout: how many ranks each model has.
            checkpoints: directory, absolute, or a storage's address.
            total_updates: optimizer steps over which the learning rate decays, unless the model has its own number.
        """
        rank = layout.first(self.section) + self.rank
        store = self._store or join_store(address)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=_COLLECTIVE_TIMEOUT
        )
        self._total_updates = self._optim.total_training_steps or total_updates
        meshes = {section: _mesh(self.device, ranks) for section, ranks in layout.ranks.items()}
        rngs.reseed(self._seed, 0, rank)
        mesh = meshes[self.section]
        assert mesh is not None
        trainer = self._build_trainer(mesh)
        self._parts = self._with_checkpoints(trainer, checkpoints)
        # An optimizer step changes the weights, so a save in flight must have read them by then.
        trainer.on_before_change(self._parts.checkpointer.fence)
        return TrainerSetup(
            num_parameters=self._num_parameters(),
            tied=trainer.names.tied,
            compute=compute_capability(self.device),
            weights=trainer.names.shapes,
        )

    def _num_parameters(self) -> int:
        """Of the whole model; shared ones count once."""
        return sum(math.prod(shape) for shape in self.trainer.names.shapes.values())

    def _with_checkpoints(self, trainer: Trainer, directory: str) -> _Parts:
        settings, seed = self._checkpoint, self._seed
        checkpointer = Checkpointer(
            directory,
            seed=seed,
            keep=_retention(settings),
            staged_fraction=settings.staged_fraction,
            timeout_seconds=settings.timeout,
            section=self.section,
        )
        replicas = MemoryCheckpoints(seed=seed, timeout_seconds=settings.timeout, section=self.section)
        return _Parts(trainer=trainer, checkpointer=checkpointer, replicas=replicas)

    def reset(self) -> None:
        """Drop everything that was shared with ranks that are gone, so that `setup` can be called again."""
        self._store = None
        checkpointer = None if self._parts is None else self._parts.checkpointer
        self._parts = None
        close_exchanges()
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
    def trainer(self) -> Trainer:
        """Of this rank."""
        return self._built.trainer

    # -- training

    def update(self, step: int, batch: RankBatch, last: bool) -> UpdateReport:
        """Take one optimizer step; after the ``last`` one of ``step`` the state must be finite.

        Raises:
            NotFinite: the gradient or the state is not finite; nothing of this step may be saved.
        """
        self.step = step
        faults.reach(f"{self.section}.update", step=step, rank=self.rank)
        lr = learning_rate(self._optim, int(self.trainer.num_updates), self._total_updates)
        try:
            report = update(self.trainer, batch, self._loss, lr)
            if last:
                self.trainer.check_finite()
            return replace(report, memory_gb=self._peak_memory())
        except NotFinite as error:
            raise NotFinite(f"step {step}: {error}") from None

    # -- self-check

    def self_check(self, responses: Sequence[Group]) -> UpdateCheck:
        """Compute twice with made-up responses; nothing that training changes is different afterwards. Collective."""
        return check_update(self.trainer, self._loss, responses)

    def first_operation(self, responses: Sequence[Group]) -> str | None:
        """Run every operation of `self_check` twice; return the first one that differs. Collective."""
        return update_operations(self.trainer, self._loss, responses).first

    # -- checkpoints

    def save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> SaveReport:
        """Write a checkpoint and wait until it is committed."""
        state, extra = self.trainer.state(), self._extra_files()
        return self._built.checkpointer.save(step, state, data=data, info=info, extra=extra)

    def start_save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> float:
        """Begin a save; return the seconds that this took."""
        began = time.perf_counter()
        state, extra = self.trainer.state(), self._extra_files()
        self._built.checkpointer.start(step, state, data=data, info=info, extra=extra)
        return time.perf_counter() - began

    def _extra_files(self) -> dict[str, object]:
        """What a checkpoint holds beside the state: with ``save_full_model_weights`` the model as RLinf writes it."""
        if self._full_weights is None:
            return {}
        return full_weights_file(self.trainer, self._full_weights, keep=self.rank == 0)

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
        state = self.trainer.state()
        model: Any = state if isinstance(state, FileState) else {"model": state["model"]}
        report = self._built.checkpointer.load(path, model, verify=verify, whole=False)
        self._check_loaded(path, self.trainer.bad_state(weights_only=True))
        return report

    def replicate(self, step: int, info: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the state as files in memory: the small ones, which rank 0 writes, and this rank's shard."""
        replica = self._built.replicas.take(step, self.trainer.state(), info=info)
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
            raise DamagedCheckpoint(f"{path}: {problem} ({self.section} rank {self.rank}): no run can continue from it")

    def _peak_memory(self) -> float:
        """As `UpdateReport.memory_gb`."""
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


def _mesh(device: torch.device, ranks: range) -> DeviceMesh | None:
    """The mesh of one model's ranks; None on the ranks of another. Collective: all ranks ask for all meshes in turn."""
    if len(ranks) == dist.get_world_size():
        return init_device_mesh(device.type, (len(ranks),))
    group = dist.new_group([*ranks])
    return DeviceMesh.from_group(group, device.type) if dist.get_rank() in ranks else None
