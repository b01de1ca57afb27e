"""Process groups of the ranks of a policy: rank = data-parallel rank * tensor-parallel size + tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.distributed as dist

from rlinf_lite.training.megatron.core import parallel_state
from rlinf_lite.training.ranks import data_parallel_size


@dataclass(frozen=True, slots=True)
class RankGroups:
    """The groups that one rank belongs to."""

    tensor: dist.ProcessGroup
    """Ranks that share one copy of the model, and compute the same units."""
    data: dist.ProcessGroup
    """Ranks with the same part of the model, which share its optimizer state."""
    everyone: dist.ProcessGroup

    @classmethod
    def create(cls, tensor_parallel: int) -> Self:
        """Create Megatron's groups over all ranks of the default process group. Collective.

        Raises:
            ConfigError: the ranks cannot be divided into groups of ``tensor_parallel``.
        """
        data_parallel_size(dist.get_world_size(), tensor_parallel)
        if parallel_state.model_parallel_is_initialized():  # of a process group that is gone
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        everyone = dist.group.WORLD
        assert everyone is not None
        return cls(parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group(), everyone)
