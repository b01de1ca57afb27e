"""The remote side of `CriticWorkers`: one rank of the critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rlinf_lite import faults
from rlinf_lite.algorithms import build_algorithm
from rlinf_lite.checkpoint import LoadReport
from rlinf_lite.cluster.workers.trainer_worker import TrainerWorker
from rlinf_lite.config import AlgorithmConfig, CheckpointConfig, ClusterConfig, CriticConfig
from rlinf_lite.models import hf_directory
from rlinf_lite.models.build import DTYPES
from rlinf_lite.training.fsdp.build import build_critic
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.types import TokenBatch


class CriticWorker(TrainerWorker):
    """One rank of the critic."""

    section: ClassVar[str] = "critic"

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        config: CriticConfig,
        algorithm: AlgorithmConfig,
        checkpoint: CheckpointConfig,
        cluster: ClusterConfig,
        seed: int,
        device: str,
        search: Sequence[str],
    ) -> None:
        """
        Args:
            search: where to look for a user's algorithm.
        """
        loss = build_algorithm(algorithm, search).losses().critic
        assert loss is not None, "critic.use_critic_model without algorithm.adv_type=gae"
        super().__init__(
            rank,
            num_ranks,
            config.optim,
            loss,
            checkpoint,
            cluster,
            seed=seed,
            device=device,
            full_weights=DTYPES[config.model.precision] if config.fsdp_config.save_full_model_weights else None,
        )
        self._config = config

    def _build_trainer(self, mesh: DeviceMesh) -> FsdpTrainer:
        model_dir = hf_directory.resolve(self._config.model.model_path, "critic.model.model_path")
        return build_critic(self._config, model_dir=model_dir, mesh=mesh, device=self.device, seed=self._seed)

    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        """Compute values, as `Trainer.forward`."""
        faults.reach("critic.values", step=self.step + 1, rank=self.rank)
        return self.trainer.forward(units)

    def load_weights(self, path: str, verify: str) -> LoadReport:
        """Take part in the loading of a policy's weights; a critic's value head would be of another reward."""
        return self._built.checkpointer.load(path, {}, verify=verify, whole=False)
