"""Cost of gradients that are bit-exact on any number of ranks: a training step beside one with FSDP2's own reduction.

    python benchmarks/elastic.py
    python benchmarks/elastic.py --ranks 2 --hidden 576 --layers 30 --rounds 3

A Llama with random weights on CPUs: one optimizer step of `--units` units of `--tokens` tokens each, in turns with this
project's sum and exact norm, and with FSDP2's reduce-scatter and `clip_grad_norm_`. Prints processor seconds of all
ranks (median over rounds), the median ratio of the pairs, and what the reduction receives at most at a time.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlinf_lite import numerics
from rlinf_lite.algorithms import Loss, build_algorithm
from rlinf_lite.config import AlgorithmConfig, FsdpConfig, ModelConfig, OptimConfig
from rlinf_lite.training.fsdp.model import ShardedPolicy
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.training.ranks import shard_mini_batch
from rlinf_lite.training.trainer import StepStats
from rlinf_lite.types import Column, MiniBatch, Normalizers, RankBatch, Segments, TokenBatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--units", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="per unit (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=320, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    options = parser.parse_args()
    print("| ranks | ordered, s | native, s | ratio | received at a time, MB |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        _save_model(options.hidden, options.layers, directory)
        for size in options.ranks:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(_rank, (size, port, directory, options), nprocs=size)


def _save_model(hidden: int, layers: int, directory: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": 8192}
    ends = {"bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=hidden // 64, **sizes, **ends)).save_pretrained(directory)


def _rank(rank: int, size: int, port: int, model_dir: str, options: argparse.Namespace) -> None:
    numerics.fix("cpu")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    trainers = {kind: _trainer(kind, model_dir, mesh) for kind in (FsdpTrainer, _NativeTrainer)}
    batch = shard_mini_batch(_mini_batch(options), size, virtual_ranks=FsdpConfig().virtual_ranks)[rank]
    loss = build_algorithm(AlgorithmConfig()).losses().policy
    pairs = []
    for number in range(1 + options.rounds):  # the first warms up
        order = list(trainers)[:: 1 if number % 2 else -1]
        seconds = {kind: _step(trainers[kind], batch, loss) for kind in order}
        pairs.append([seconds[kind] for kind in trainers])
    if rank == 0:
        ordered, native = (median(times) for times in zip(*pairs[1:], strict=True))
        ratio = median(one / other for one, other in pairs[1:])
        received = max(map(_num_bytes, trainers[FsdpTrainer].sharded.root.modules())) if size > 1 else 0
        print(f"| {size} | {ordered:.2f} | {native:.2f} | {ratio:.3f} | {received / 1e6:.1f} |", flush=True)
    dist.destroy_process_group()


def _step(trainer: FsdpTrainer, batch: RankBatch, loss: Loss) -> float:
    """Processor seconds of all ranks."""
    dist.barrier()
    began = time.process_time()
    trainer.forward_backward(batch, loss)
    trainer.optim_step(1e-6)
    spent = torch.tensor(time.process_time() - began, dtype=torch.float64)
    dist.all_reduce(spent)
    return spent.item()


def _num_bytes(module: torch.nn.Module) -> int:
    """Of the gradient, on all ranks, of what FSDP2 reduces with this module."""
    group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
    return 0 if group is None else sum(4 * shard.sharded_param.numel() for shard in group.fsdp_params)


class _NativeSum:
    """Takes the place of `GradientSum`: reduced by FSDP2 after each unit, in an order that follows the ranks."""

    def __init__(self, trainer: FsdpTrainer) -> None:
        self._trainer = trainer
        for module in trainer.sharded.root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(DefaultReduceScatter())

    def begin(self) -> None:
        self._trainer.optimizer.zero_grad()

    def begin_round(self, num_slots: int, *, is_last: bool) -> None:
        pass

    def reduce_next(self, reduce: bool) -> None:
        assert reduce


class _NativeTrainer(FsdpTrainer):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._gradient_sum = _NativeSum(self)  # type: ignore[assignment]

    def optim_step(self, lr: float) -> StepStats:
        self.optimizer.param_groups[0]["lr"] = lr
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_grad)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepStats(grad_norm=norm.item(), skipped=False)


def _trainer(kind: type[FsdpTrainer], model_dir: str, mesh: DeviceMesh) -> FsdpTrainer:
    model = ShardedPolicy(
        ModelConfig(model_path=model_dir),
        FsdpConfig(),
        model_dir=Path(model_dir),
        mesh=mesh,
        device=torch.device("cpu"),
        temperature=1.0,
    )
    return kind(model, OptimConfig(clip_grad=1e-3), FsdpConfig(), key="actor", seed=1)


def _mini_batch(options: argparse.Namespace) -> MiniBatch:
    length, draw = options.tokens, torch.Generator().manual_seed(1)
    units = []
    for index in range(options.units):
        ids = torch.randint(0, 8192, (length,), generator=draw)
        start, stop = torch.zeros(1, dtype=torch.int64), torch.tensor([length])
        units.append(
            TokenBatch(
                index=index,
                ids_N=ids,
                positions_N=torch.arange(length),
                segments=Segments(start_S=start, stop_S=stop, parent_S=torch.tensor([-1])),
                source_M=torch.arange(length - 1),
                targets_M=ids[1:],
                seq_M=torch.zeros(length - 1, dtype=torch.int64),
                num_responses=1,
                columns={Column.ADVANTAGE: torch.randn(length - 1, generator=draw)},
            )
        )
    norm = Normalizers(num_tokens=options.units * (length - 1), num_sequences=options.units)
    return MiniBatch(units=tuple(units), norm=norm)


if __name__ == "__main__":
    main()
