"""Programs that the tests run on every rank, inside an initialised process group."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.config import Config
from rlinf_lite.data.batching import Batching, StepBatch
from rlinf_lite.ties import tied_names
from rlinf_lite.training.ranks import shard, shard_mini_batch
from rlinf_lite.training.trainer import PolicyTrainer
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


def batching_of(config: Config) -> Batching:
    return Batching.of(config.algorithm, config.runner, config.rollout, seed=config.actor.seed)


def step(
    trainer: PolicyTrainer,
    config: Config,
    rollouts: list[Rollout],
    advantages: Tensor,
    number: int,
    left_out: Collection[int] = (),
) -> list[Any]:
    """A step as the runner makes it: old and reference log-probs, then the updates; returns this rank's reports."""
    batch = StepBatch(rollouts, advantages, step=number, pad_id=0, batching=batching_of(config), left_out=left_out)
    fields = {"old_logprobs_BT": False} if config.algorithm.n_minibatches > 1 else {}
    if config.algorithm.kl_beta:
        fields["ref_logprobs_BT"] = True
    logprobs = {}
    for field, reference in fields.items():
        cuts, micro_batches = batch.for_logprobs()
        mine = shard(micro_batches, trainer.world_size)[trainer.rank]
        logprobs[field] = batch.by_row(cuts, gathered(trainer.logprobs(mine, reference=reference)))
    minibatches = [shard_mini_batch(minibatch, trainer.world_size) for minibatch in batch.for_update(logprobs)]
    reports = [trainer.update(ranks[trainer.rank]) for ranks in minibatches]
    trainer.check_finite()
    return reports


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
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    rollouts: list[Rollout],
    advantages: Tensor,
    num_steps: int = 1,
    left_out: Collection[int] = (),
) -> dict[str, Any]:
    trainer = make_trainer(mesh, model_dir, config)
    reports = [
        report
        for number in range(1, num_steps + 1)
        for report in step(trainer, config, rollouts, advantages, number, left_out)
    ]
    return {
        **snapshot(trainer),
        "reports": reports,
        "tied": tied_names(trainer.model),
        "local_rows": {name: (start, len(rows)) for name, start, rows in trainer.local_weights(torch.float32)},
        "dtypes": {tensor.dtype for tensor in trainer.model.parameters()},
    }


def logprobs(
    mesh: DeviceMesh, *, model_dir: str, config: Config, rollouts: list[Rollout], reference: bool
) -> dict[str, Any]:
    trainer = make_trainer(mesh, model_dir, config)
    batch = StepBatch(rollouts, torch.zeros(len(rollouts)), step=1, pad_id=0, batching=batching_of(config))
    cuts, micro_batches = batch.for_logprobs()
    mine = trainer.logprobs(shard(micro_batches, trainer.world_size)[trainer.rank], reference=reference)
    return {
        "mine": mine,
        "by_row": batch.by_row(cuts, gathered(mine)),
        "training": trainer.model.training,
        "has_reference": trainer.reference is not None,
    }


def published(
    mesh: DeviceMesh, *, model_dir: str, config: Config, rollouts: list[Rollout], advantages: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """Both forms in which the trainer gives out its weights, after a step."""
    trainer = make_trainer(mesh, model_dir, config)
    step(trainer, config, rollouts, advantages, 1)
    return {
        "local": list(trainer.local_weights(dtype)),
        "whole": list(trainer.whole_weights(dtype)),
        **snapshot(trainer),
    }


def train_with_failures(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    rollouts: list[Rollout],
    advantages_of_steps: list[Tensor],
    total_updates: int = 100,
) -> list[dict[str, Any]]:
    """Steps of which some may not be finite: the error's message or the report of each, and the state after it."""
    trainer = make_trainer(mesh, model_dir, config, total_updates)
    seen: list[dict[str, Any]] = [snapshot(trainer)]
    for number, advantages in enumerate(advantages_of_steps, 1):
        outcome: dict[str, Any] = {}
        try:
            outcome["report"] = step(trainer, config, rollouts, advantages, number)[0]
        except FloatingPointError as error:
            outcome["error"] = str(error)
        seen.append({**snapshot(trainer), **outcome})
    return seen


def train_and_save(
    mesh: DeviceMesh,
    *,
    model_dir: str,
    config: Config,
    rollouts: list[Rollout],
    advantages: Tensor,
    root: str,
    steps: range,
    save_after: int | None = None,
    load: str | None = None,
    draw: int = 0,
) -> dict[str, Any]:
    """The steps ``steps``, from a checkpoint if one is given, after ``draw`` random numbers."""
    trainer = make_trainer(mesh, model_dir, config, total_updates=8)
    checkpointer = Checkpointer(Path(root), seed=1)
    if load is not None:
        torch.rand(7)  # restored RNG state does not depend on it
        checkpointer.load(Path(load), trainer.state())
    torch.rand(draw)
    reports, path = [], None
    for number in steps:
        reports += step(trainer, config, rollouts, advantages, number)
        if number == save_after:
            path = str(checkpointer.save(number, trainer.state(), data={}, info={}).path)
    return {**snapshot(trainer), "reports": reports, "path": path, "random": torch.rand(4)}


def train_on_a_nan(
    mesh: DeviceMesh, *, model_dir: str, config: Config, rollouts: list[Rollout], advantages: Tensor, broken: str
) -> tuple[str | None, str | None, str | None]:
    """Two steps; before the second, rank 1 finds a NaN in one tensor of its shard: ``weight`` or a moment's name.

    Returns what `bad_state` said before it, the second step's error, and what `bad_state` says then.
    """
    trainer = make_trainer(mesh, model_dir, config)
    step(trainer, config, rollouts, advantages, 1)
    before, error = trainer.bad_state(), None
    if mesh.get_local_rank() == 1:
        param = list(trainer.model.parameters())[-1]
        tensor = param.detach() if broken == "weight" else trainer.optimizer.state[param][broken]
        tensor.to_local().view(-1)[0] = torch.nan
    try:
        step(trainer, config, rollouts, advantages, 2)
    except FloatingPointError as raised:
        error = str(raised)
    return before, error, trainer.bad_state()
