"""Programs that the tests run on every rank, inside an initialised process group."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite import rng
from rlinf_lite.algorithms import LossInputs, LossOutputs
from rlinf_lite.checkpoint.live import HostBuffer, LiveTensors
from rlinf_lite.checkpoint.memory.files import MemoryWriter
from rlinf_lite.checkpoint.parts import FilesPart
from rlinf_lite.config import Config
from rlinf_lite.training.megatron.build import build_policy
from rlinf_lite.training.megatron.groups import RankGroups
from rlinf_lite.training.megatron.trainer import MegatronTrainer
from rlinf_lite.training.ranks import shard, shard_mini_batch
from rlinf_lite.types import Column, MiniBatch, Normalizers, RankBatch, TokenBatch
from rlinf_lite.weights.megatron.mapping import weights
from rlinf_lite.weights.megatron.packing import unpack

CPU = torch.device("cpu")


class WeightedSum:
    """A loss that is linear in log-probs and entropies, with a weight per token: `Column.ADVANTAGE`."""

    wants_entropy = True

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        weight_M = inputs.columns[Column.ADVANTAGE]
        total = (weight_M * inputs.logprob_M).sum() + 0.3 * (weight_M * inputs.entropy_M).sum()
        return LossOutputs(loss=total, shares={"loss": total.detach()}, token_sums={})


def build(model_dir: str, config: Config) -> MegatronTrainer:
    groups = RankGroups.create(config.actor.megatron.tensor_model_parallel_size)
    return build_policy(config.actor, config.algorithm, model_dir=Path(model_dir), groups=groups, device=CPU)


def own(trainer: MegatronTrainer, units: list[TokenBatch]) -> tuple[TokenBatch | None, ...]:
    """This rank's units."""
    data = trainer.groups.data
    return shard(units, data.size())[data.rank()]


def own_batch(trainer: MegatronTrainer, units: list[TokenBatch]) -> RankBatch:
    mini_batch = MiniBatch(units=tuple(units), norm=Normalizers(num_tokens=1, num_sequences=1))
    data = trainer.groups.data
    return shard_mini_batch(mini_batch, data.size(), virtual_ranks=5040)[data.rank()]


def whole_gradients(trainer: MegatronTrainer) -> dict[str, Tensor]:
    """The reduced gradients of all ranks, by Hugging Face names."""
    optimizer, partition, groups = trainer.optimizer, trainer.sharded.partition, trainer.groups
    slices = [torch.empty_like(optimizer.own_gradient) for _ in range(groups.data.size())]
    dist.all_gather(slices, optimizer.own_gradient, group=groups.data)
    mine = unpack(torch.cat(slices)[: optimizer.num_floats], partition.shapes())
    ranks: list[Any] = [None] * groups.tensor.size()
    dist.all_gather_object(ranks, mine, group=groups.tensor)
    found: dict[str, Tensor] = {}
    for weight in weights(partition.arch):
        parts = [rank[weight.name] for rank in ranks]
        assert weight.is_sharded or all(torch.equal(part, parts[0]) for part in parts), weight.name
        found |= partition.join(weight, parts)
    return {name: tensor.clone() for name, tensor in found.items()}


def pass_and_step(model_dir: str, config: Config, units: list[TokenBatch], num_steps: int) -> dict[str, Any]:
    """Log-probs, the gradient of `WeightedSum`, and the weights after some optimizer steps with it."""
    trainer = build(model_dir, config)
    logprobs = trainer.forward(own(trainer, units))
    norms, gradients, stats = [], {}, {}
    for step in range(num_steps):
        stats = trainer.forward_backward(own_batch(trainer, units), WeightedSum())
        if step == 0:
            trainer.optimizer.reduce(trainer.partial, trainer.groups.tensor)
            gradients = whole_gradients(trainer)
            trainer.forward_backward(own_batch(trainer, units), WeightedSum())
        norms.append(trainer.optim_step(config.actor.optim.lr).grad_norm)
        trainer.check_finite()
    return {
        "logprobs": {index: tensor.numpy() for index, tensor in logprobs.items()},
        "losses": {index: unit.shares["loss"] for index, unit in stats.items()},
        "gradients": gradients,
        "norms": norms,
        "rows": [(name, first, rows.clone()) for name, first, rows in trainer.weights(torch.float32)],
        "whole": {name: rows.clone() for name, _, rows in trainer.whole_weights(torch.float32)},
    }


def bytes_for_backward(model_dir: str, config: Config, units: list[TokenBatch]) -> int:
    """Of activations that a pass keeps, summed over units; parameters do not count."""
    trainer = build(model_dir, config)
    weights_of = {param.untyped_storage().data_ptr() for param in trainer.optimizer.params.values()}
    total = 0
    for unit in units:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights_of:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = trainer.sharded(unit, with_entropy=False)
        total += sum(kept.values())
        del outputs
    return total


def saved(trainer: MegatronTrainer, step: int) -> dict[str, bytes]:
    """The files of all ranks, as a checkpoint writes them."""
    part, live, mine = FilesPart.of(trainer.state(), step), LiveTensors(0.0, HostBuffer()), dict[str, bytes]()

    @contextmanager
    def create(name: str, num_bytes: int) -> Iterator[MemoryWriter]:
        file = MemoryWriter(num_bytes)
        yield file
        mine[name] = file.content().tobytes()

    live.open(part.num_bytes(), part.tensor)
    part.write(create, live)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    assert sum(map(len, ranks)) == len({name for rank in ranks for name in rank}), "two ranks write one file"
    if model := next((data for name, data in mine.items() if name.endswith("model_optim_rng.pt")), None):
        # Megatron-core's own model takes it.
        trainer.sharded.gpt.load_state_dict(decoded(model)["model"], strict=True)
    return {name: data for rank in ranks for name, data in rank.items()}


def decoded(data: bytes) -> Any:
    """As Megatron-LM reads them: with no classes but those that megatron-core registers as safe."""
    import megatron.core  # noqa: F401

    return torch.load(io.BytesIO(data), weights_only=True)


def load(trainer: MegatronTrainer, files: dict[str, bytes], *, weights_only: bool = False) -> bool:
    def read(name: str) -> object:
        return decoded(files[name]) if name.endswith(".pt") else files[name]

    return trainer.state().load(files.keys(), read, weights_only=weights_only)


def snapshot(trainer: MegatronTrainer) -> dict[str, Any]:
    """All that training changes on this rank, and the next random numbers."""
    optimizer = trainer.optimizer
    return {
        **{f"model.{name}": param.detach().clone() for name, param in optimizer.params.items()},
        **{f"optim.{part}": flat.clone() for part, flat in optimizer.flat.items()},
        "steps": torch.tensor([optimizer.num_steps, int(trainer.num_updates), *adam_steps(trainer)]),
        "scaler": torch.tensor(scaler_state(trainer), dtype=torch.float64),
        "rng": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64),
    }


def scaler_state(trainer: MegatronTrainer) -> list[float]:
    scaler = trainer.scaler
    return [] if scaler is None else [scaler.scale, scaler.growth_tracker, scaler.hysteresis_tracker]


def adam_steps(trainer: MegatronTrainer) -> set[int]:
    return {int(state["step"]) for state in trainer.optimizer.adam.state.values()}


def train(trainer: MegatronTrainer, config: Config, units: list[TokenBatch], num_steps: int) -> None:
    for _ in range(num_steps):
        torch.rand(3)  # moves the RNG state
        trainer.forward_backward(own_batch(trainer, units), WeightedSum())
        trainer.optim_step(config.actor.optim.lr)


def run_straight(model_dir: str, config: Config, units: list[TokenBatch], num_steps: int = 2) -> dict[str, Any]:
    """Some steps, a save, one step that is skipped, two more steps."""
    trainer = build(model_dir, config)
    train(trainer, config, units, num_steps)
    trainer.skip_step()
    files = saved(trainer, 7)
    train(trainer, config, units, 2)
    return {"files": files, "end": snapshot(trainer)}


def run_on(model_dir: str, config: Config, units: list[TokenBatch], files: dict[str, bytes]) -> dict[str, Any]:
    """What `run_straight` does after its save, in a new trainer with another RNG state."""
    rng.reseed(77, 0, 0)
    trainer = build(model_dir, config)
    train(trainer, config, units, 1)
    restored = load(trainer, files)
    assert trainer.bad_state() is None
    files_again = saved(trainer, 7)
    train(trainer, config, units, 2)
    return {"restored": restored, "files": files_again, "end": snapshot(trainer)}


def scaled_steps(model_dir: str, config: Config, units: list[TokenBatch], num_steps: int) -> list[dict[str, Any]]:
    """Steps with a scaled loss: what each did, and what it left."""
    trainer = build(model_dir, config)
    found = []
    for _ in range(num_steps):
        before = {name: param.detach().clone() for name, param in trainer.optimizer.params.items()}
        trainer.forward_backward(own_batch(trainer, units), WeightedSum())
        stats = trainer.optim_step(config.actor.optim.lr)
        params = trainer.optimizer.params.items()
        found.append(
            {
                "skipped": stats.skipped,
                "norm": stats.grad_norm,
                "changed": any(not torch.equal(param, before[name]) for name, param in params),
                "scale": trainer.scaler.scale,
                "updates": (int(trainer.num_updates), trainer.optimizer.num_steps),
            }
        )
    assert trainer.bad_state() is None
    return found


def load_weights(model_dir: str, config: Config, units: list[TokenBatch], files: dict[str, bytes]) -> dict[str, Any]:
    """Only the weights; then a step, which shows whether the optimizer has them too."""
    trainer = build(model_dir, config)
    assert not load(trainer, files, weights_only=True)
    before = {name: rows.clone() for name, _, rows in trainer.whole_weights(torch.float32)}
    train(trainer, config, units, 1)
    moved = {name: rows.clone() for name, _, rows in trainer.whole_weights(torch.float32)}
    return {"weights": before, "moved": moved, "steps": trainer.optimizer.num_steps}
