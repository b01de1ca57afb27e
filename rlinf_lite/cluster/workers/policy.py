"""The policy's ranks as the driver calls them: log-probs, updates, and weights for the engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinf_lite.cluster.group import Call, WorkerGroup, wait_all
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers import wire  # noqa: F401 -- says how units are pickled
from rlinf_lite.cluster.workers.records import StoreAddress
from rlinf_lite.config import ActorConfig, AlgorithmConfig, CheckpointConfig
from rlinf_lite.training.ranks import data_parallel_size, for_each_rank, shard, shard_mini_batch
from rlinf_lite.types import MiniBatch, TokenBatch
from rlinf_lite.user_code import search_path

if TYPE_CHECKING:  # both import torch, which the driver does later
    from torch import Tensor

    from rlinf_lite.training.update import UpdateReport
    from rlinf_lite.weights.checksum import Checksums
    from rlinf_lite.weights.region import Layout, RegionAddress
    from rlinf_lite.weights.shared import SharedWeights
    from rlinf_lite.weights.transport import PackedWeights


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
        self._virtual_ranks = config.fsdp_config.virtual_ranks
        self._tensor_parallel = config.megatron.tensor_model_parallel_size
        data_parallel_size(len(session.placement.workers("actor")), self._tensor_parallel)
        super().__init__(config.group_name, "actor", target, session, spares, *arguments)

    @property
    def _num_groups(self) -> int:
        """Groups of ranks that compute different units: with tensor parallelism each has several ranks."""
        return data_parallel_size(self.size, self._tensor_parallel)

    # -- training

    def start_forward(self, units: Sequence[TokenBatch], *, reference: bool) -> list[Call[dict[int, Tensor]]]:
        """Compute log-probs of the policy, or of the reference model, without gradients.

        Returns:
            Each rank's, by `TokenBatch.index`: float32 [M].
        """
        of_ranks = for_each_rank(shard(units, self._num_groups), self._tensor_parallel)
        return self.start_each("forward", [(of_rank, reference) for of_rank in of_ranks])

    def start_update(self, step: int, batch: MiniBatch, *, last: bool) -> list[Call[UpdateReport]]:
        """Take one optimizer step on all ranks; each is sent its own units only.

        Args:
            last: the last one of ``step``: the state must be finite afterwards.

        Raises:
            NotFinite: the gradient or the state is not finite; nothing of this step may be saved.
        """
        by_group = shard_mini_batch(batch, self._num_groups, virtual_ranks=self._virtual_ranks)
        of_ranks = for_each_rank(by_group, self._tensor_parallel)
        return self.start_each("update", [(step, of_rank, last) for of_rank in of_ranks])

    # -- weights

    def start_weight_rows(self, precision: str) -> list[Call[PackedWeights]]:
        """Put each rank's rows of every weight into the object store."""
        return self.start("weight_rows", precision)

    def start_row_checksums(self, precision: str) -> list[Call[Checksums]]:
        """Compute checksums of each rank's rows of every weight."""
        return self.start("row_checksums", precision)

    def start_make_region(self, layout: Layout) -> Call[RegionAddress | str]:
        """Let rank 0 make shared memory for all weights: how it is opened, or why there is none."""
        return self.start_one(0, "make_region", layout)

    def start_open_region(self, address: RegionAddress) -> list[Call[str | None]]:
        """Let the other ranks open it: why one cannot, or None."""
        return [self.start_one(rank, "open_region", address) for rank in range(1, self.size)]

    def start_write_region(self, precision: str) -> list[Call[None]]:
        """Let each rank write its rows of every weight into that memory."""
        return self.start("write_region", precision)

    def start_opening_engines(self, weights: Sequence[Call[SharedWeights]]) -> list[Call[None]]:
        """Let every rank open the memory in which engines keep their weights."""
        return self.start("open_engines", *(call.ref for call in weights))

    def start_write_weights(self, precision: str) -> list[Call[Checksums]]:
        """Let each rank write its rows of every weight into the engines' memory; checksums of what it wrote."""
        return self.start("write_weights", precision)

    def open_channel(self, num_receivers: int) -> StoreAddress:
        """Let rank 0 open the store at which it meets the rollout workers that it broadcasts weights to."""
        address: StoreAddress = wait_all([self.start_one(0, "open_channel", num_receivers)])[0]
        return address

    def start_joining_channel(self, num_receivers: int) -> Call[None]:
        """Let rank 0 join the broadcast group."""
        return self.start_one(0, "join_channel", num_receivers)

    def start_broadcast(self, precision: str) -> list[Call[Checksums]]:
        """Gather each weight whole, and let rank 0 broadcast it; checksums of what each rank sent."""
        return self.start("broadcast", precision)
