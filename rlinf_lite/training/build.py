"""Builds the models of one rank of the policy with the backend that the config names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from rlinf_lite.config import ActorConfig, AlgorithmConfig
from rlinf_lite.training.trainer import Scorer, Trainer


def build_models(
    actor: ActorConfig, algorithm: AlgorithmConfig, *, model_dir: Path, mesh: DeviceMesh, device: torch.device
) -> tuple[Trainer, Scorer | None]:
    """Build the policy with its optimizer and, with a KL term, the frozen reference.

    Args:
        model_dir: Hugging Face directory with the base weights.
        mesh: over all ranks of the policy; for Megatron they must be all ranks of the process group.
    """
    if actor.training_backend == "megatron":
        from rlinf_lite.training.megatron import build as megatron  # imports megatron-core, which takes seconds
        from rlinf_lite.training.megatron.groups import RankGroups

        groups = RankGroups.create(actor.megatron.tensor_model_parallel_size)
        return (
            megatron.build_policy(actor, algorithm, model_dir=model_dir, groups=groups, device=device),
            megatron.build_reference(actor, algorithm, model_dir=model_dir, groups=groups, device=device),
        )
    from rlinf_lite.training.fsdp import build as fsdp

    return (
        fsdp.build_policy(actor, algorithm, model_dir=model_dir, mesh=mesh, device=device),
        fsdp.build_reference(actor, algorithm, model_dir=model_dir, mesh=mesh, device=device),
    )
