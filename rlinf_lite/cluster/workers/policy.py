"""The policy's ranks as the driver calls them: log-probs, updates, checkpoints, and weights for the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlinf_lite.cluster.group import Call, WorkerGroup, wait_all
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers.records import PolicySetup, StoreAddress
from rlinf_lite.config import ActorConfig, AlgorithmConfig, CheckpointConfig
from rlinf_lite.training.ranks import shard, shard_mini_batch
from rlinf_lite.types import MiniBatch, TokenBatch
from rlinf_lite.user_code import search_path

if TYPE_CHECKING:  # both import torch, which the driver does later
    from torch import Tensor

    from rlinf_lite.checkpoint import LoadReport, SaveError, SaveReport
    from rlinf_lite.training.update import UpdateReport
    from rlinf_lite.weights.transport import PackedWeights

Files = dict[str, np.ndarray]
"""Checkpoint files in memory: uint8 [num_bytes] by name."""


class PolicyWorkers(WorkerGroup):
    """All ranks of the policy. Methods that do not begin with ``start`` wait, and raise as `wait_all`."""

    def __init__(
        self,
        config: ActorConfig,
        algorithm: AlgorithmConfig,
        checkpoint: CheckpointConfig,
        session: Session,
        spares: Spares,
    ) -> None:
        """Start every process; does not wait until they are up."""
        target = "rlinf_lite.cluster.workers.policy_worker:PolicyWorker"
        arguments = config, algorithm, checkpoint, session.config, session.device, search_path()
        super().__init__(config.group_name, "actor", target, session, spares, *arguments)

    def setup(self, checkpoints: str, total_updates: int) -> list[PolicySetup]:
        """Connect the ranks, and build, shard and fill the model.

        Args:
            checkpoints: directory, absolute, or a storage's address.
            total_updates: optimizer steps of the whole run.
        """
        (address,) = wait_all([self.start_one(0, "open_store")])
        return self.call("setup", address, checkpoints, total_updates)

    def reset(self, seconds: float) -> list[int]:
        """Let every rank drop what it shares with the others; return the ranks that did not, within ``seconds``."""
        return self.failed(self.start("reset"), seconds)

    # -- training

    def forward(self, units: Sequence[TokenBatch], *, reference: bool) -> dict[int, Tensor]:
        """Compute log-probs of the policy, or of the reference model, without gradients.

        Returns:
            By `TokenBatch.index`: float32 [M].
        """
        of_ranks = shard(units, self.size)
        results: list[dict[int, Tensor]] = wait_all(
            self.start_each("forward", [(of_rank, reference) for of_rank in of_ranks])
        )
        return {index: logprobs for result in results for index, logprobs in result.items()}

    def update(self, step: int, batch: MiniBatch, *, last: bool) -> list[UpdateReport]:
        """Take one optimizer step on all ranks; each is sent its own units only.

        Args:
            last: the last one of ``step``: the state must be finite afterwards.

        Raises:
            NotFinite: the gradient or the state is not finite; nothing of this step may be saved.
        """
        of_ranks = shard_mini_batch(batch, self.size)
        return wait_all(self.start_each("update", [(step, of_rank, last) for of_rank in of_ranks]))

    # -- checkpoints

    def save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> list[SaveReport]:
        """Write a checkpoint; return when it is committed."""
        return self.call("save", step, data, info)

    def start_save(self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]) -> list[float]:
        """Begin a save; return the seconds that each rank needed for that."""
        return self.call("start_save", step, data, info)

    def poll_save(self) -> list[SaveReport | SaveError | None]:
        """Return how the save in flight ended on each rank, once; None for a rank on which it has not ended."""
        return self.call("poll_save")

    def finish_save(self) -> list[SaveReport | SaveError | None]:
        """Wait for the save in flight, then as `poll_save`; None for a rank that has reported its end before."""
        return self.call("finish_save")

    def load(self, path: str, verify: str) -> LoadReport:
        """Load a checkpoint; return rank 0's report. Raises CheckpointError."""
        report: LoadReport = self.call("load", path, verify)[0]
        return report

    def load_weights(self, path: str, verify: str) -> LoadReport:
        """Load only the model of a checkpoint; return rank 0's report. Raises CheckpointError."""
        report: LoadReport = self.call("load_weights", path, verify)[0]
        return report

    def start_replicas(
        self, step: int, data: Mapping[str, Any], info: Mapping[str, Any]
    ) -> tuple[list[Call[Files]], list[Call[Files]]]:
        """Copy the state into memory. Per rank: the small files, which only rank 0 has, and the shard."""
        return self.start_in_two("replicate", step, data, info)

    def load_replicas(self, step: int, small: Files, shards: Sequence[Call[Files]]) -> LoadReport:
        """Load what `start_replicas` of another number of ranks may have copied; return rank 0's report.

        Raises:
            CheckpointError: the copy is damaged.
        """
        refs = [shard.ref for shard in shards]
        same = len(refs) == self.size
        args = [(step, small, *([refs[rank]] if same else refs)) for rank in range(self.size)]
        report: LoadReport = wait_all(self.start_each("load_replica", args))[0]
        return report

    # -- weights

    def start_weight_rows(self, precision: str) -> list[Call[PackedWeights]]:
        """Put each rank's rows of every weight into the object store."""
        return self.start("weight_rows", precision)

    def open_channel(self, num_receivers: int) -> StoreAddress:
        """Let rank 0 open the store at which it meets the rollout workers that it broadcasts weights to."""
        address: StoreAddress = wait_all([self.start_one(0, "open_channel", num_receivers)])[0]
        return address

    def start_joining_channel(self, num_receivers: int) -> Call[None]:
        """Let rank 0 join the broadcast group."""
        return self.start_one(0, "join_channel", num_receivers)

    def start_broadcast(self, precision: str) -> list[Call[None]]:
        """Gather each weight whole, and let rank 0 broadcast it."""
        return self.start("broadcast", precision)

    # -- facts

    def memory(self) -> list[float]:
        """Return the peak memory of each rank in GB."""
        return self.call("memory")
