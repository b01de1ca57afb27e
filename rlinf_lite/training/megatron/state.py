"""The trainer's state as the files of Megatron's layout; see weights/megatron/files.py for their structure.

Data-parallel rank 0 of each tensor-parallel rank writes two files. Beside what Megatron has there, they hold the RNG
state of every data-parallel rank, and the number of optimizer steps with the skipped ones. Loading needs no collective:
each rank takes its own part from the files, whatever the number of ranks that wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.config import OptimConfig
from rlinf_lite.training.megatron import rng
from rlinf_lite.training.megatron.model import MegatronModel
from rlinf_lite.training.megatron.optimizer import FlatAdam
from rlinf_lite.training.megatron.scaler import LossScaler
from rlinf_lite.weights.megatron.content import arguments, model_file, optimizer_file, param_groups, unchanging
from rlinf_lite.weights.megatron.files import (
    LATEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    OURS,
    PARTS,
    MegatronFiles,
    rank_file,
)
from rlinf_lite.weights.megatron.mapping import weights


@dataclass(slots=True)
class Counters:
    """What training changes beside the tensors."""

    num_updates: Tensor
    """As `Trainer.num_updates`."""
    lr: float
    """Of the last optimizer step: for readers of the files."""


class MegatronState:
    """One rank's state. Methods are collective, as far as they say."""

    def __init__(
        self,
        model: MegatronModel,
        optimizer: FlatAdam,
        counters: Counters,
        optim: OptimConfig,
        scaler: LossScaler | None,
    ) -> None:
        self._model, self._optimizer, self._counters, self._optim = model, optimizer, counters, optim
        self._scaler = scaler
        self._groups = model.groups

    def files(self, step: int) -> dict[str, object]:
        """The files that this rank writes, by path within the section. Collective.

        Tensors are the live ones where one rank has them whole: parameters, and without data parallelism the
        optimizer's.
        """
        groups, optimizer = self._groups, self._optimizer
        is_writer = groups.data.rank() == 0
        parts = {part: self._gathered(optimizer.flat[part]) for part in PARTS}
        states: list[Any] | None = [None] * groups.data.size() if is_writer else None
        dist.gather_object(rng.capture(), states, group=groups.data, group_dst=0)
        if not is_writer:
            return {}
        rank = groups.tensor.rank()
        found: dict[str, object] = {
            rank_file(step, rank, MODEL_FILE): self._model_file(step, states),
            rank_file(step, rank, OPTIMIZER_FILE): optimizer_file(
                parts, dtype=optimizer.dtype, num_floats=optimizer.num_floats
            ),
        }
        if rank == 0:
            found[LATEST_FILE] = str(step).encode()
        return found

    def _gathered(self, own: Tensor) -> object:
        """The slices of all data-parallel ranks, in CPU memory, if this rank writes; the live tensor if it is alone."""
        group, num_floats = self._groups.data, self._optimizer.num_floats
        if group.size() == 1:
            return own[:num_floats]
        mine = own.cpu()
        slices = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == 0 else None
        dist.gather(mine, slices, group=group, group_dst=0)
        return None if slices is None else unchanging(torch.cat(slices)[:num_floats])

    def _model_file(self, step: int, states: list[Any] | None) -> dict[str, Any]:
        assert states is not None
        args = arguments(
            self._model.partition,
            dtype=self._optimizer.dtype,
            model=self._model.described,
            vocab_divisor=self._model.vocab_divisor,
        )
        ours = {
            "num_updates": int(self._counters.num_updates),
            "tensor_model_parallel_size": self._groups.tensor.size(),
            "data_parallel_size": self._groups.data.size(),
            "sequence_parallel": self._model.sequence_parallel,
            "rng_states": states,
        }
        return model_file(
            step,
            args,
            self._model.gpt.state_dict(),
            optimizer={"optimizer": {"param_groups": self._param_groups()}, **self._grad_scaler()},
            opt_param_scheduler=self._scheduler(),
            rng_state=[states[0]],
            **{OURS: ours},
        )

    def _grad_scaler(self) -> dict[str, Any]:
        return {} if self._scaler is None else {"grad_scaler": self._scaler.state()}

    def _param_groups(self) -> list[dict[str, Any]]:
        optim = self._optim
        return param_groups(
            lr=self._counters.lr,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
            step=self._optimizer.num_steps,
        )

    def _scheduler(self) -> dict[str, Any]:
        optim = self._optim
        return {
            "max_lr": optim.lr,
            "lr_warmup_steps": optim.lr_warmup_steps,
            "num_steps": int(self._counters.num_updates),
            "lr_decay_style": optim.lr_scheduler,
            "lr_decay_steps": optim.total_training_steps or 0,
            "min_lr": optim.min_lr,
            "start_wd": optim.weight_decay,
            "end_wd": optim.weight_decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": 0,
        }

    # -- loading

    @torch.no_grad()
    def load(self, names: Collection[str], read: Callable[[str], object], *, weights_only: bool) -> bool:
        """Fill the live state from the files of a checkpoint; not collective.

        Args:
            names: all files of the section, written by any number of ranks.
            read: returns the content of one.
            weights_only: leave optimizer state, counters and RNG state as they are.

        Returns:
            Whether this rank's own RNG state was restored: not if other numbers of ranks, ranks
            with another ``sequence_parallel``, or Megatron wrote the files.

        Raises:
            CheckpointError: as `MegatronFiles`.
        """
        optimizer, rank, partition = self._optimizer, self._groups.tensor.rank(), self._model.partition
        files = MegatronFiles(names, read, partition.arch)
        if weights_only:
            for weight in weights(partition.arch):
                optimizer.params[weight.name].copy_(files.parameter(weight, partition, rank))
            optimizer.follow_parameters()
            return False
        files.check_dtype(optimizer.dtype)
        num_steps, ours = files.num_optimizer_steps, files.model_file(min(rank, files.size - 1)).get(OURS)
        for weight in weights(partition.arch):
            optimizer.params[weight.name].copy_(files.parameter(weight, partition, rank))
            for part in PARTS:
                optimizer.load(part, weight.name, files.optimizer(part, weight, partition, rank))
        optimizer.set_num_steps(num_steps)
        self._counters.num_updates = torch.tensor(num_steps if ours is None else ours["num_updates"])
        self._counters.lr = files.learning_rate
        if self._scaler is not None:
            self._scaler.load(files.grad_scaler)
        division = self._groups.tensor.size(), self._groups.data.size(), self._model.sequence_parallel
        if ours is None or (files.size, ours["data_parallel_size"], ours.get("sequence_parallel", False)) != division:
            return False  # sums are taken in another order, so nothing would be bit-equal with the same RNG state
        rng.restore(ours["rng_states"][self._groups.data.rank()])
        return True
