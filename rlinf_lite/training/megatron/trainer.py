"""`MegatronTrainer`: the `Trainer` over Megatron-core. It uses torch.distributed, but neither Ray nor checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.algorithms import Loss, LossOutputs
from rlinf_lite.config import OptimConfig
from rlinf_lite.errors import NotFinite
from rlinf_lite.training.fsdp.norm import clip, gradient_norm
from rlinf_lite.training.fsdp.state import first_non_finite
from rlinf_lite.training.fsdp.trainer import fetch_stats, loss_inputs
from rlinf_lite.training.megatron.export import local_rows, whole
from rlinf_lite.training.megatron.model import MegatronModel
from rlinf_lite.training.megatron.optimizer import FlatAdam
from rlinf_lite.training.megatron.scaler import LossScaler
from rlinf_lite.training.megatron.state import Counters, MegatronState
from rlinf_lite.training.trainer import StepStats, UnitStats
from rlinf_lite.types import RankBatch, TokenBatch
from rlinf_lite.weights.megatron.files import PARTS
from rlinf_lite.weights.megatron.mapping import weights
from rlinf_lite.weights.pieces import WeightPiece

_REMEDY = "actor.optim.lr, set actor.optim.clip_grad, or compute in fp32 (actor.model.precision)"


class MegatronTrainer:
    """One rank of a policy with its part of the optimizer; see `Trainer` for methods without a docstring of their own.

    All tensor-parallel ranks of one data-parallel rank are given the same units.
    """

    def __init__(self, model: MegatronModel, optim: OptimConfig, scaler: LossScaler | None = None) -> None:
        """
        Args:
            scaler: for parameters in fp16.
        """
        self.sharded, self.device, self.groups, self.names = model, model.device, model.groups, model.names
        self.rank, self.world_size = dist.get_rank(), model.groups.data.size()
        self._clip_grad = optim.clip_grad or math.inf
        self._optim = optim
        mapped = weights(model.partition.arch)
        self._sharded_names = {weight.name for weight in mapped if weight.is_sharded}
        self.partial = [
            weight.name
            for weight in mapped
            if weight.is_head_norm or (model.sequence_parallel and not weight.is_sharded)
        ]
        """Parameters of which each tensor-parallel rank has only its own heads' or tokens' part of the gradient."""
        self.optimizer = FlatAdam(dict(model.gpt.named_parameters()), model.groups.data, optim)
        self.scaler = scaler
        self._counters = Counters(num_updates=torch.zeros((), dtype=torch.int64), lr=optim.lr)
        self._hooks: list[Callable[[], None]] = []

    @property
    def num_updates(self) -> Tensor:
        """As `Trainer.num_updates`. The learning rate follows the run's progress, and ends with the run."""
        return self._counters.num_updates

    # -- forward and backward

    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        return self.sharded.forward(units)

    def forward_backward(self, batch: RankBatch, loss: Loss) -> dict[int, UnitStats]:
        reports: dict[int, LossOutputs] = {}
        self.optimizer.drop_gradients()
        for unit in batch.units:
            if unit is None:  # no collective of a pass reaches beyond the ranks that have the same units
                continue
            outputs = self.sharded(unit, with_entropy=loss.wants_entropy)
            leaves = outputs.leaves()
            report = loss(loss_inputs(unit, leaves, batch.norm, self.device))
            (report.loss if self.scaler is None else report.loss * self.scaler.scale).backward()
            outputs.backward(leaves)
            reports[unit.index] = report
        return fetch_stats(reports)

    @torch.no_grad()
    def optim_step(self, lr: float) -> StepStats:
        self.optimizer.reduce(self.partial, self.groups.tensor)
        if self.scaler is not None:
            self.optimizer.unscale(self.scaler.scale)
        norm = self._gradient_norm()
        is_finite = math.isfinite(norm)
        if self.scaler is not None:
            self.scaler.update(overflowed=not is_finite)
        if not is_finite:
            self.optimizer.drop_gradients()
            if self.scaler is not None:
                self.skip_step()
                return StepStats(grad_norm=norm, skipped=True)
            raise NotFinite(
                f"the gradient norm is {norm} after {int(self.num_updates)} optimizer steps; nothing was updated. "
                f"Lower {_REMEDY}"
            )
        clip([gradient for _, gradient in self.optimizer.reduced()], norm, self._clip_grad)
        for hook in self._hooks:
            hook()
        self.optimizer.step(lr)
        self._counters.lr = lr
        self.skip_step()
        return StepStats(grad_norm=norm, skipped=False)

    def _gradient_norm(self) -> float:
        """Over all ranks; parameters that every tensor-parallel rank has count once."""
        is_first = self.groups.tensor.rank() == 0
        counted = [part for name, part in self.optimizer.reduced() if is_first or name in self._sharded_names]
        nothing = torch.zeros(0, device=self.device)
        return gradient_norm([*counted, nothing], self.groups.everyone)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return self.optimizer.gradients()

    def drop_gradients(self) -> None:
        self.optimizer.drop_gradients()

    def skip_step(self) -> None:
        # Not in place: without an optimizer step nothing waits for a save that may still be reading the tensor.
        self._counters.num_updates = self._counters.num_updates + 1

    def on_before_change(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    # -- state and weights

    def state(self) -> MegatronState:
        return MegatronState(self.sharded, self.optimizer, self._counters, self._optim, self.scaler)

    def check_finite(self) -> None:
        # A NaN or an infinity stays in the state, whichever mini-batch caused it: once per step is enough.
        if (name := self._non_finite()) is not None:
            raise NotFinite(
                f"{name} holds a NaN or an infinity after {int(self.num_updates)} optimizer steps (rank {self.rank}). "
                "This state is neither saved nor replicated: the newest checkpoint is of an earlier step. "
                f"Lower {_REMEDY}"
            )

    def bad_state(self, *, weights_only: bool = False) -> str | None:
        if (name := self._non_finite(weights_only=weights_only)) is not None:
            return f"{name} holds a NaN or an infinity"
        if weights_only:
            return None
        if self.scaler is not None and not 0 < self.scaler.scale < math.inf:
            return f"grad_scaler.scale is {self.scaler.scale}"
        steps, updates = self.optimizer.num_steps, int(self.num_updates)
        return None if 0 <= steps <= updates else f"optimizer step {steps} after {updates} optimizer steps"

    def _non_finite(self, *, weights_only: bool = False) -> str | None:
        tensors = {f"model.{name}": param.detach() for name, param in self.optimizer.params.items()}
        if not weights_only:
            for slot, place in self.optimizer.own_places():
                tensors |= {f"optim.{slot.name}.{part}": self.optimizer.flat[part][place] for part in PARTS}
        return first_non_finite(tensors)

    def weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        return local_rows(self.sharded, dtype)

    def whole_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        return whole(self.sharded, dtype)
