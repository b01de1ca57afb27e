"""The critic's ranks as the driver calls them: values and updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinf_lite.cluster.group import Call, WorkerGroup
from rlinf_lite.cluster.session import Session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.workers import wire  # noqa: F401 -- says how units are pickled
from rlinf_lite.config import AlgorithmConfig, CheckpointConfig, CriticConfig
from rlinf_lite.training.ranks import shard, shard_mini_batch
from rlinf_lite.types import MiniBatch, TokenBatch
from rlinf_lite.user_code import search_path

if TYPE_CHECKING:  # imports torch, which the driver does later
    from torch import Tensor

    from rlinf_lite.training.update import UpdateReport


class CriticWorkers(WorkerGroup):
    """All ranks of the critic."""

    def __init__(
        self,
        config: CriticConfig,
        algorithm: AlgorithmConfig,
        checkpoint: CheckpointConfig,
        session: Session,
        spares: Spares,
        *,
        seed: int,
    ) -> None:
        """Start every process; does not wait until they are up."""
        target = "rlinf_lite.cluster.workers.critic_worker:CriticWorker"
        arguments = config, algorithm, checkpoint, session.config, seed, session.device, search_path()
        self._virtual_ranks = config.fsdp_config.virtual_ranks
        super().__init__(config.group_name, "critic", target, session, spares, *arguments)

    def start_forward(self, units: Sequence[TokenBatch]) -> list[Call[dict[int, Tensor]]]:
        """Compute the values before the loss tokens, without gradients.

        Returns:
            Each rank's, by `TokenBatch.index`: float32 [M].
        """
        return self.start_each("forward", [(of_rank,) for of_rank in shard(units, self.size)])

    def start_update(self, step: int, batch: MiniBatch, *, last: bool) -> list[Call[UpdateReport]]:
        """As `PolicyWorkers.start_update`."""
        of_ranks = shard_mini_batch(batch, self.size, virtual_ranks=self._virtual_ranks)
        return self.start_each("update", [(step, of_rank, last) for of_rank in of_ranks])
