"""Builds the models of one rank, as the config asks for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from rlinf_lite.config import ActorConfig, AlgorithmConfig, CriticConfig, FsdpConfig
from rlinf_lite.training.fsdp.flat_trainer import FlatTrainer
from rlinf_lite.training.fsdp.model import ShardedCritic, ShardedPolicy
from rlinf_lite.training.fsdp.trainer import FsdpTrainer


def build_policy(
    actor: ActorConfig, algorithm: AlgorithmConfig, *, model_dir: Path, mesh: DeviceMesh, device: torch.device
) -> FsdpTrainer:
    """Build the policy and its optimizer; see `ShardedModel` for the arguments."""
    return _kind(actor.fsdp_config)(
        _policy(actor, algorithm, model_dir, mesh, device),
        actor.optim,
        actor.fsdp_config,
        key="actor",
        seed=actor.seed,
    )


def build_reference(
    actor: ActorConfig, algorithm: AlgorithmConfig, *, model_dir: Path, mesh: DeviceMesh, device: torch.device
) -> ShardedPolicy | None:
    """Build the frozen base model; None without a KL term."""
    if not algorithm.kl_beta:
        return None
    reference = _policy(actor, algorithm, model_dir, mesh, device)
    reference.model.eval().requires_grad_(False)
    return reference


def build_critic(
    critic: CriticConfig, *, model_dir: Path, mesh: DeviceMesh, device: torch.device, seed: int
) -> FsdpTrainer:
    """Build the critic and its optimizer. A value head that the directory does not hold begins as zeros.

    Args:
        seed: as of `FsdpTrainer`.
    """
    model = ShardedCritic(critic.model, critic.fsdp_config, model_dir=model_dir, mesh=mesh, device=device)
    return _kind(critic.fsdp_config)(
        model,
        critic.optim,
        critic.fsdp_config,
        key="critic",
        seed=seed,
    )


def _kind(fsdp: FsdpConfig) -> type[FsdpTrainer]:
    return FlatTrainer if fsdp.strategy == "fsdp" else FsdpTrainer


def _policy(
    actor: ActorConfig, algorithm: AlgorithmConfig, model_dir: Path, mesh: DeviceMesh, device: torch.device
) -> ShardedPolicy:
    sampling = algorithm.sampling_params
    return ShardedPolicy(
        actor.model,
        actor.fsdp_config,
        model_dir=model_dir,
        mesh=mesh,
        device=device,
        temperature=sampling.temperature if sampling.do_sample else 1.0,
    )
