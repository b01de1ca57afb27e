"""The policy's ranks as the driver calls them: log-probs, updates, and weights for the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    from rlinf_lite.node.bell import BellAddress
    from rlinf_lite.training.update import UpdateReport
    from rlinf_lite.weights.checksum import Checksums
    from rlinf_lite.weights.region import Layout, RegionAddress
    from rlinf_lite.weights.shared import SharedWeights
    from rlinf_lite.weights.transport import PackedWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Weights that ranks write to shared memory at the end of an update."""

    step: int
    """Completed steps of the weights."""
    calls: list[Call[Any]]
    """By rank; they end when it has written."""
    sums: list[Call[Checksums]]
    """As `PolicyWorkers.start_row_checksums`."""


class PolicyWorkers(WorkerGroup):
    """All ranks of the policy. Methods that do not begin with ``start`` wait, and raise as `wait_all`."""

    _write_precision: str | None = None
    """As `write_after_updates` was given."""
    _written: Written | None = None
    """As `written_by_update`, of the newest step."""

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
        if self._write_precision is None or not last:
            return self.start_each("update", [(step, of_rank, last) for of_rank in of_ranks])
        args = [(step, of_rank, self._write_precision) for of_rank in of_ranks]
        reports, sums = self.start_each_in_two("update_and_write", args)
        self._written = Written(step=step, calls=reports, sums=sums)
        return reports

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

    def start_open_bells(self, engines: Sequence[Sequence[BellAddress]]) -> list[Call[str | None]]:
        """Let each rank open what each engine offers it: why it cannot, or None."""
        return self.start("open_bells", *engines)

    def start_write_region(self, precision: str) -> list[Call[None]]:
        """Let each rank write its rows of every weight into that memory."""
        return self.start("write_region", precision)

    def write_after_updates(self, precision: str | None) -> None:
        """From now on each rank writes its rows at the end of a step's last update and tells engines; None: no more.

        That is quicker than calls of Ray.
        """
        self._write_precision, self._written = precision, None

    def written_by_update(self, step: int) -> Written | None:
        """The calls that write the weights after ``step``, if those of its update do."""
        return self._written if self._written is not None and self._written.step == step else None

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
