"""The remote actor: a shell of a few lines a method around a `PolicyTrainer` and a `Checkpointer`."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from rlinf_lite import faults
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
from rlinf_lite.cluster.process import compute_capability, prepare, serve_store
from rlinf_lite.config import CheckpointConfig, Config
from rlinf_lite.errors import NotFinite
from rlinf_lite.models import build, hf_directory
from rlinf_lite.ties import tied_names
from rlinf_lite.training.trainer import PolicyTrainer, UpdateReport
from rlinf_lite.types import MicroBatch, MiniBatch
from rlinf_lite.weights.names import weight_shapes
from rlinf_lite.weights.transport import Broadcaster, PackedWeights, pack

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class ActorWorker:
    """One rank of the policy: a `PolicyTrainer` and a `Checkpointer`."""

    def __init__(self, rank: int, world_size: int, config: Config, device: str) -> None:
        self.rank, self.world_size, self.config = rank, world_size, config
        self.device = prepare(config, device)
        self.store: dist.TCPStore | None = None
        self.channel: Broadcaster | None = None
        self.step = 0
        """The last one whose update was begun here, or that was loaded; for `faults`."""

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0: open the store that all ranks meet at."""
        self.store, address = serve_store(self.world_size)
        return address

    def setup(self, address: tuple[str, int], checkpoints: str, total_updates: int) -> dict[str, Any]:
        """Join the process group, then build, shard and fill the model. Returns facts for the log and the manifest."""
        store = self.store or dist.TCPStore(*address, is_master=False)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=_COLLECTIVE_TIMEOUT
        )
        rngs.reseed(self.config.actor.seed, 0, self.rank)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.trainer = PolicyTrainer(
            self.config.actor,
            self.config.algorithm,
            model_dir=hf_directory.resolve(self.config.actor.model.model_path),
            mesh=mesh,
            device=self.device,
            total_updates=total_updates,
        )
        settings = self.config.runner.checkpoint
        self.checkpointer = Checkpointer(
            checkpoints,
            seed=self.config.actor.seed,
            keep=_retention(settings),
            staged_fraction=settings.staged_fraction,
            timeout_seconds=settings.timeout,
        )
        self.replicas = MemoryCheckpoints(seed=self.config.actor.seed, timeout_seconds=settings.timeout)
        # From here on the weights change: a save in flight must have read them.
        self.trainer.optimizer.register_step_pre_hook(lambda *_: self.checkpointer.fence())
        return {
            "num_parameters": sum(p.numel() for p in self.trainer.model.parameters()),
            "tied": tied_names(self.trainer.model),
            "compute": compute_capability(self.device),
            "weights": weight_shapes(self.trainer.model),
        }

    def reset(self) -> None:
        """Other ranks are gone: let go of everything that was shared with them, to be set up again."""
        self.store = self.channel = None
        checkpointer: Checkpointer | None = self.__dict__.pop("checkpointer", None)
        for shared in ("trainer", "replicas", "channel_store"):
            self.__dict__.pop(shared, None)
        if dist.is_initialized():
            dist.destroy_process_group()
        if checkpointer is not None:
            with suppress(SaveError, TypeError):
                checkpointer.finish()  # it must not commit when the run has gone back
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weight_rows(self, precision: str) -> PackedWeights:
        """This rank's rows of every weight, for the object store."""
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        return pack(self.trainer.local_weights(build.DTYPES[precision]))

    def serve_channel(self, num_receivers: int) -> tuple[str, int]:
        """Rank 0: the store at which the group that weights are broadcast over meets."""
        self.channel_store, address = serve_store(1 + num_receivers)
        return address

    def join_channel(self, num_receivers: int) -> None:
        """Rank 0: returns when every rollout worker has joined too."""
        self.channel = Broadcaster(self.channel_store, rank=0, size=1 + num_receivers, device=self.device)

    def broadcast(self, precision: str) -> None:
        """Gather each weight whole over the actors; rank 0 broadcasts it to the rollout workers."""
        for piece in self.trainer.whole_weights(build.DTYPES[precision]):
            if self.rank == 0:
                assert self.channel is not None
                self.channel.broadcast(piece.rows.contiguous())

    def logprobs(self, micro_batches: list[MicroBatch], reference: bool) -> dict[int, torch.Tensor]:
        faults.reach("actor.logprobs", step=self.step + 1, rank=self.rank)
        return self.trainer.logprobs(micro_batches, reference=reference)

    def update(self, step: int, batch: MiniBatch, last: bool) -> UpdateReport:
        """One optimizer step; after the ``last`` one of ``step`` the state must be finite.

        Raises:
            NotFinite: it is not, or the gradient is not; nothing of this step may be saved.
        """
        self.step = step
        faults.reach("actor.update", step=step, rank=self.rank)
        try:
            report = self.trainer.update(batch)
            if last:
                self.trainer.check_finite()
            return report
        except NotFinite as error:
            raise NotFinite(f"step {step}: {error}") from None

    def save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> SaveReport:
        return self.checkpointer.save(step, self.trainer.state(), data=data, info=info)

    def start_save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> float:
        """Begin a save; returns the seconds that it took."""
        began = time.perf_counter()
        self.checkpointer.start(step, self.trainer.state(), data=data, info=info)
        return time.perf_counter() - began

    def poll_save(self) -> SaveReport | SaveError | None:
        """How the save in flight ended on this rank, once; None: it has not."""
        return _outcome(self.checkpointer.poll)

    def finish_save(self) -> SaveReport | SaveError | None:
        """Wait for the save in flight, then as `poll_save`; None too when its end was told before."""
        return _outcome(self.checkpointer.finish)

    def load(self, path: str, verify: str) -> LoadReport:
        report = self.checkpointer.load(path, self.trainer.state(), verify=verify)
        self._refuse(path, self.trainer.bad_state())
        self.step = report.manifest.step
        return report

    def _refuse(self, path: str, problem: str | None) -> None:
        # Collective calls are over by now: a rank may find it alone.
        if problem is not None:
            raise DamagedCheckpoint(f"{path}: {problem} (rank {self.rank}): no run can go on from it")

    def replicate(
        self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The state as files in memory. Returns the small ones (of rank 0), and this rank's shard."""
        replica = self.replicas.take(step, self.trainer.state(), data=data, info=info)
        return replica.small, replica.shard

    def load_replica(self, step: int, *files: Mapping[str, np.ndarray]) -> LoadReport:
        """Go back to a state that `replicate` took."""
        given = {name: data for part in files for name, data in part.items()}
        report = self.replicas.load(step, given, self.trainer.state())
        self._refuse(f"(memory) step {step}", self.trainer.bad_state())
        self.step = step
        return report

    def load_weights(self, path: str, verify: str) -> LoadReport:
        """Only the model; moments, counters and generators stay as they are."""
        model = {"model": self.trainer.state()["model"]}
        report = self.checkpointer.load(path, model, verify=verify, whole=False)
        name = self.trainer.non_finite(weights_only=True)
        self._refuse(path, None if name is None else f"{name} holds a NaN or an infinity")
        return report

    def state_digest(self) -> str:
        """sha256 of parameters, moments and counters. Collective."""
        return state_digest(flatten(self.trainer.state()))

    def memory(self) -> float:
        """Peak memory in GB: of the GPU, or resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _outcome(ask: Callable[[], SaveReport | None]) -> SaveReport | SaveError | None:
    # A value, because a call to all ranks ends with the first that raises, and each of them tells only once.
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
