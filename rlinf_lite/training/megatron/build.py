"""Builds the models of one rank, as the config asks for them."""

from __future__ import annotations

from pathlib import Path

import torch

from rlinf_lite.config import ActorConfig, AlgorithmConfig
from rlinf_lite.training.megatron.groups import RankGroups
from rlinf_lite.training.megatron.model import MegatronModel
from rlinf_lite.training.megatron.scaler import LossScaler
from rlinf_lite.training.megatron.trainer import MegatronTrainer


def build_policy(
    actor: ActorConfig, algorithm: AlgorithmConfig, *, model_dir: Path, groups: RankGroups, device: torch.device
) -> MegatronTrainer:
    """Build the policy and its optimizer; see `MegatronModel` for the arguments."""
    model = _policy(actor, algorithm, model_dir, groups, device)
    scaler = LossScaler.of(actor.megatron) if actor.model.precision == "fp16" else None
    return MegatronTrainer(model, actor.optim, scaler)


def build_reference(
    actor: ActorConfig, algorithm: AlgorithmConfig, *, model_dir: Path, groups: RankGroups, device: torch.device
) -> MegatronModel | None:
    """Build the frozen base model; None without a KL term."""
    if not algorithm.kl_beta:
        return None
    reference = _policy(actor, algorithm, model_dir, groups, device)
    reference.gpt.requires_grad_(False)
    return reference


def _policy(
    actor: ActorConfig, algorithm: AlgorithmConfig, model_dir: Path, groups: RankGroups, device: torch.device
) -> MegatronModel:
    sampling = algorithm.sampling_params
    return MegatronModel(
        actor.model,
        actor.megatron,
        model_dir=model_dir,
        groups=groups,
        device=device,
        temperature=sampling.temperature if sampling.do_sample else 1.0,
    )
