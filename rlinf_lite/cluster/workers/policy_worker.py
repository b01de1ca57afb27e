"""The remote side of `PolicyWorkers`: one rank of the policy, which publishes its weights to the rollout workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rlinf_lite import faults
from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.cluster.workers.device import peak_flops
from rlinf_lite.cluster.workers.records import StoreAddress
from rlinf_lite.cluster.workers.rendezvous import serve_store
from rlinf_lite.cluster.workers.trainer_worker import TrainerWorker
from rlinf_lite.config import ActorConfig, AlgorithmConfig, CheckpointConfig, ClusterConfig
from rlinf_lite.models import build, hf_directory
from rlinf_lite.node.bell import Bell, BellAddress
from rlinf_lite.training.build import build_models
from rlinf_lite.training.trainer import Scorer, Trainer
from rlinf_lite.training.update import UpdateReport
from rlinf_lite.types import RankBatch, TokenBatch
from rlinf_lite.weights.checksum import Checksums, RunningChecksums, checksums
from rlinf_lite.weights.region import Layout, Region, RegionAddress
from rlinf_lite.weights.shared import OpenWeights, SharedWeights
from rlinf_lite.weights.transport import Broadcaster, PackedWeights, pack


class PolicyWorker(TrainerWorker):
    """One rank of the policy and, with a KL term, of the frozen reference."""

    section: ClassVar[str] = "actor"

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
        loss = build_algorithm(algorithm, search).losses().policy
        full = config.training_backend == "fsdp" and config.fsdp_config.save_full_model_weights
        super().__init__(
            rank,
            num_ranks,
            config.optim,
            loss,
            checkpoint,
            cluster,
            seed=config.seed,
            device=device,
            full_weights=build.DTYPES[config.model.precision] if full else None,
        )
        self._config, self._algorithm = config, algorithm
        self._reference: Scorer | None = None
        self._channel_store: dist.TCPStore | None = None
        self._channel: Broadcaster | None = None
        self._region: Region | None = None
        self._bell: Bell | None = None

    def _build_trainer(self, mesh: DeviceMesh) -> Trainer:
        model_dir = hf_directory.resolve(self._config.model.model_path)
        given: dict[str, Any] = {"model_dir": model_dir, "mesh": mesh, "device": self.device}
        trainer, self._reference = build_models(self._config, self._algorithm, **given)
        precision = self._config.fsdp_config.mixed_precision.param_dtype or self._config.model.precision
        self._peak_flops = peak_flops(self.device, build.DTYPES[precision])
        return trainer

    def update(self, step: int, batch: RankBatch, last: bool) -> UpdateReport:
        """As `TrainerWorker.update`; the report also says how much was computed."""
        report = super().update(step, batch, last)
        if not report.num_tokens:
            return report
        num_tokens = sum(len(unit.ids_N) for unit in batch.units if unit is not None)
        # With tensor parallelism several ranks share each unit.
        flops = 6.0 * self._num_parameters() * num_tokens * self.trainer.world_size / self.num_ranks
        return replace(report, flops=flops, peak_flops=self._peak_flops)

    def update_and_write(self, step: int, batch: RankBatch, precision: str) -> tuple[UpdateReport, Checksums]:
        """Take the last optimizer step of ``step``, `write_region`, tell the engines that ``step`` is written.

        Returns:
            As `update`, and as `row_checksums`.
        """
        assert self._bell is not None, "called before open_bells"
        try:
            report = self.update(step, batch, True)
            self.write_region(precision)
        except BaseException:
            self._bell.close()  # or engines would wait
            raise
        self._bell.ring(step)
        return report, self.row_checksums(precision)

    def reset(self) -> None:
        """As `TrainerWorker.reset`."""
        self._channel_store = self._channel = self._reference = self._region = self._bell = None
        super().reset()

    def forward(self, units: Sequence[TokenBatch | None], reference: bool) -> dict[int, Tensor]:
        """Compute log-probs of the policy or of the reference, as `Trainer.forward`."""
        faults.reach("actor.logprobs", step=self.step + 1, rank=self.rank)
        if not reference:
            return self.trainer.forward(units)
        assert self._reference is not None, "there is no KL term"
        return self._reference.forward(units)

    # -- weights for the rollout workers

    def weight_rows(self, precision: str) -> PackedWeights:
        """Return this rank's rows of every weight, for the object store."""
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        return pack(self.trainer.weights(build.DTYPES[precision]))

    def row_checksums(self, precision: str) -> Checksums:
        """Return checksums of this rank's rows of every weight, from the trainer itself and not from a packed copy."""
        return checksums(self.trainer.weights(build.DTYPES[precision]))

    def make_region(self, layout: Layout) -> RegionAddress | str:
        """Rank 0: make shared memory for the weights of all ranks; return how it is opened, or why there is none."""
        try:
            self._region, address = Region.make(layout)
        except OSError as error:
            return f"rank {self.rank}: {error}"
        return address

    def open_region(self, address: RegionAddress) -> str | None:
        """Open what rank 0 made; return why that is not possible, None if it is."""
        try:
            self._region = Region.open(address, is_private=False)
        except OSError as error:
            return f"rank {self.rank}: {error}"
        return None

    def open_bells(self, *engines: Sequence[BellAddress]) -> str | None:
        """Open what engines offer to each rank, to tell them that it has written; return why that is not possible."""
        try:
            self._bell = Bell([of_ranks[self.rank] for of_ranks in engines])
        except OSError as error:
            return f"rank {self.rank}: {error}"
        return None

    def write_region(self, precision: str) -> None:
        """Write this rank's rows of every weight into the shared memory that was made or opened."""
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        assert self._region is not None, "called before make_region or open_region"
        self._region.write(self.trainer.weights(build.DTYPES[precision]))

    def open_engines(self, *engines: SharedWeights) -> None:
        """Open the memory in which engines keep their weights."""
        self._engines = OpenWeights(engines)

    def write_weights(self, precision: str) -> Checksums:
        """Write this rank's rows of every weight into the engines that were opened; returns their checksums."""
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        running = RunningChecksums()
        self._engines.write(running.passing(self.trainer.weights(build.DTYPES[precision])))
        return running.result()

    def open_channel(self, num_receivers: int) -> StoreAddress:
        """Rank 0: open the store at which it meets the rollout workers that it broadcasts weights to."""
        self._channel_store, address = serve_store(1 + num_receivers)
        return address

    def join_channel(self, num_receivers: int) -> None:
        """Rank 0: return when every rollout worker has joined too."""
        assert self._channel_store is not None, "called before open_channel"
        self._channel = Broadcaster(self._channel_store, rank=0, size=1 + num_receivers, device=self.device)

    def broadcast(self, precision: str) -> Checksums:
        """Gather each weight whole over the ranks; rank 0 broadcasts it to the rollout workers.

        Returns:
            Checksums of what this rank sent.
        """
        faults.reach("actor.rows", step=self.step + 1, rank=self.rank)
        pieces, running = self.trainer.whole_weights(build.DTYPES[precision]), RunningChecksums()
        if self.rank:
            for _ in pieces:
                pass
        broken: RuntimeError | None = None
        for piece in running.passing(pieces):
            assert self._channel is not None, "called before join_channel"
            try:
                if broken is None:
                    self._channel.broadcast(piece.rows.contiguous())
            except RuntimeError as error:
                broken = error  # the other ranks wait until every weight is gathered, whatever became of an engine
        if broken is not None:
            raise broken
        return running.result()
