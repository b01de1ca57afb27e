"""What the tests run on every rank, inside an initialised process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.config import Config
from rlinf_lite.data.batching import StepBatch
from rlinf_lite.models import build
from rlinf_lite.training import PolicyTrainer
from rlinf_lite.types import Rollout


def make_trainer(mesh: DeviceMesh, model_dir: str, config: Config, total_updates: int = 100) -> PolicyTrainer:
    return PolicyTrainer(
        config.actor,
        config.algorithm,
        model_dir=Path(model_dir),
        mesh=mesh,
        device=torch.device("cpu"),
        total_updates=total_updates,
    )


def step(trainer: PolicyTrainer, config: Config, rollouts: list[Rollout], advantages: Tensor, number: int) -> list[Any]:
    """A step as the runner makes it: old and reference log-probs, then the updates; returns this rank's reports."""
    batch = StepBatch(rollouts, advantages, step=number, pad_id=0, config=config)
    fields = {"old_logprobs_BT": False} if config.algorithm.n_minibatches > 1 else {}
    if config.algorithm.kl_beta:
        fields["ref_logprobs_BT"] = True
    logprobs = {}
    for field, reference in fields.items():
        cuts, micro_batches = batch.for_logprobs()
        logprobs[field] = batch.by_row(cuts, gathered(trainer.logprobs(micro_batches, reference=reference)))
    return [trainer.update(minibatch) for minibatch in batch.for_update(logprobs)]


def gathered(mine: dict[int, Any]) -> dict[int, Any]:
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return {index: value for part in parts for index, value in part.items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(trainer: PolicyTrainer) -> dict[str, Any]:
    """Everything that training changes, put together from all ranks."""
    state = trainer.state()
    return {
        "model": {name: whole(tensor) for name, tensor in state["model"].items()},
        "optim": {
            name: {key: whole(value) for key, value in moments.items()} for name, moments in state["optim"].items()
        },
        "num_updates": int(state["lr_scheduler"]["num_updates"]),
        "grad_scaler": state["grad_scaler"].state_dict() if "grad_scaler" in state else None,
    }


def train(
    mesh: DeviceMesh, *, model_dir: str, config: Config, rollouts: list[Rollout], advantages: Tensor, num_steps: int = 1
) -> dict[str, Any]:
    trainer = make_trainer(mesh, model_dir, config)
    reports = [
        report
        for number in range(1, num_steps + 1)
        for report in step(trainer, config, rollouts, advantages, number)
    ]
    return {
        **snapshot(trainer),
        "reports": reports,
        "tied": build.tied_names(trainer.model),
        "local_rows": {name: (start, len(rows)) for name, (start, rows) in trainer.weight_rows(torch.float32).items()},
        "dtypes": {tensor.dtype for tensor in trainer.model.parameters()},
    }
