"""`FsdpTrainer`: the `Trainer` over FSDP2. It uses torch.distributed, but neither Ray nor checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from rlinf_lite import rng
from rlinf_lite.algorithms import Loss, LossInputs, LossOutputs
from rlinf_lite.config import FsdpConfig, OptimConfig
from rlinf_lite.errors import NotFinite
from rlinf_lite.training.fsdp.model import ShardedModel, TokenOutputs
from rlinf_lite.training.fsdp.norm import clip, gradient_norm
from rlinf_lite.training.fsdp.reduction import GradientSum, ReducedGradients
from rlinf_lite.training.fsdp.state import (
    MOMENTS,
    GradScalerState,
    build_optimizer,
    first_non_finite,
    optimizer_state,
)
from rlinf_lite.training.trainer import StepStats, UnitStats
from rlinf_lite.types import Column, Normalizers, RankBatch, TokenBatch
from rlinf_lite.weights.live import LiveWeights, local_pieces
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.source import whole_pieces


class FsdpTrainer:
    """One rank of a sharded model with AdamW; see `Trainer` for the methods without a docstring of their own."""

    def __init__(
        self,
        model: ShardedModel,
        optim: OptimConfig,
        fsdp: FsdpConfig,
        *,
        key: str,
        seed: int,
    ) -> None:
        """
        Args:
            key: the config section of the model, for messages: ``"actor"``.
            seed: of random numbers that a forward pass draws, such as dropout.
        """
        self.sharded, self.model, self.device = model, model.model, model.device
        self._key, self._seed = key, seed
        self.rank, self.world_size = model.mesh.get_local_rank(), model.mesh.size()
        self.names, self._params = model.names, model.params
        self.model.train()
        if fsdp.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._clip_grad = optim.clip_grad or float("inf")
        params = list(self._params.values())
        self._gradient_sum = self._sum_of(params, fsdp)
        self.optimizer = build_optimizer(
            params,
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
        )
        # Includes skipped steps: the learning rate follows the run's progress, and ends with the run.
        self.num_updates = torch.zeros((), dtype=torch.int64)
        scaler = fsdp.grad_scaler
        self.scaler = GradScaler(
            self.device.type,
            init_scale=scaler.init_scale,
            growth_factor=scaler.growth_factor,
            backoff_factor=scaler.backoff_factor,
            growth_interval=scaler.growth_interval,
            enabled=scaler.enabled,
        )

    def _sum_of(self, params: list[nn.Parameter], fsdp: FsdpConfig) -> GradientSum | ReducedGradients:
        in_place = _is_summed_in_place(params, fsdp)
        return GradientSum(
            self.sharded.root, params, num_ranks=self.world_size, in_place=in_place, exchange=self.sharded.exchange
        )

    # -- forward and backward

    def forward(self, units: Sequence[TokenBatch | None]) -> dict[int, Tensor]:
        return self.sharded.forward(units)

    def forward_backward(self, batch: RankBatch, loss: Loss) -> dict[int, UnitStats]:
        reports: dict[int, LossOutputs] = {}
        self._gradient_sum.begin()
        for number, current in enumerate(batch.rounds, 1):
            self._gradient_sum.begin_round(current.num_slots, is_last=number == len(batch.rounds))
            for place, unit in enumerate(current.units, 1):
                self._gradient_sum.reduce_next(place == len(current.units))
                if unit is None:
                    self.scaler.scale(self.sharded.idle()).backward()
                else:
                    reports[unit.index] = self._backward(unit, loss, batch.norm)
        return fetch_stats(reports)

    def _backward(self, unit: TokenBatch, loss: Loss, norm: Normalizers) -> LossOutputs:
        # By the unit, not by the rank: what is drawn does not depend on where, or after what, it is computed.
        rng.reseed(self._seed, self._key, int(self.num_updates), unit.index)
        outputs = self.sharded(unit, with_entropy=loss.wants_entropy)
        leaves = outputs.leaves()
        report = loss(loss_inputs(unit, leaves, norm, self.device))
        self.scaler.scale(report.loss).backward()
        outputs.backward(leaves)
        return report

    def optim_step(self, lr: float) -> StepStats:
        self.optimizer.param_groups[0]["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        shards = self._gradient_sum.gradients()
        norm = gradient_norm(shards, self.sharded.mesh.get_group(), self.sharded.exchange)
        finite = math.isfinite(norm)
        if not finite and not self.scaler.is_enabled():
            self.optimizer.zero_grad()
            raise NotFinite(
                f"the gradient norm is {norm} after {int(self.num_updates)} optimizer steps; nothing was "
                f"updated. Lower {self._key}.optim.lr, or compute in fp32 ({self._key}.model.precision, "
                f"{self._key}.fsdp_config.mixed_precision)"
            )
        clip(shards, norm, self._clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.skip_step()
        return StepStats(grad_norm=norm, skipped=not finite)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self._params.items():
            if param.grad is not None:
                yield name, param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def skip_step(self) -> None:
        # Not in place: without an optimizer step nothing waits for a save that may still be reading the tensor.
        self.num_updates = self.num_updates + 1

    def on_before_change(self, hook: Callable[[], None]) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: hook())

    # -- state and weights

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": self.sharded.live,
            "optim": optimizer_state(self._params, self.optimizer),
            "lr_scheduler": {"num_updates": self.num_updates},
        }
        if self.scaler.is_enabled():
            state["grad_scaler"] = GradScalerState(self.scaler)
        return state

    def check_finite(self) -> None:
        # A NaN or an infinity stays in the state, whichever mini-batch caused it: once per step is enough.
        if (name := self._non_finite()) is not None:
            raise NotFinite(
                f"{name} holds a NaN or an infinity after {int(self.num_updates)} optimizer steps (rank {self.rank}). "
                f"This state is neither saved nor replicated: the newest checkpoint is of an earlier step. Lower "
                f"{self._key}.optim.lr, set {self._key}.optim.clip_grad, or compute in fp32 "
                f"({self._key}.model.precision, {self._key}.fsdp_config.mixed_precision)"
            )

    def bad_state(self, *, weights_only: bool = False) -> str | None:
        if (name := self._non_finite(weights_only=weights_only)) is not None:
            return f"{name} holds a NaN or an infinity"
        if weights_only:
            return None
        if self.num_updates < 0:
            return f"lr_scheduler.num_updates is {int(self.num_updates)}"
        for name, adam in optimizer_state(self._params, self.optimizer).items():
            steps = adam["step"].item()
            if not 0 <= steps <= int(self.num_updates) or steps != int(steps):
                return f"optim.{name}.step is {steps} after {int(self.num_updates)} optimizer steps"
        if self.scaler.is_enabled() and not 0 < self.scaler.get_scale() < float("inf"):
            return f"grad_scaler.scale is {self.scaler.get_scale()}"
        return None

    def _non_finite(self, *, weights_only: bool = False) -> str | None:
        tensors = {f"model.{name}": param.detach() for name, param in self._params.items()}
        if not weights_only:
            for name, adam in optimizer_state(self._params, self.optimizer).items():
                tensors |= {f"optim.{name}.{moment}": adam[moment] for moment in MOMENTS}
        return first_non_finite(tensors)

    def weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        return local_pieces(self.sharded.live, dtype)

    def whole_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        return whole_pieces(LiveWeights(self.model, self.device), dtype)


def _is_summed_in_place(params: list[nn.Parameter], fsdp: FsdpConfig) -> bool:
    """See `GradientSum`."""
    reduced = fsdp.mixed_precision.reduce_dtype or fsdp.mixed_precision.param_dtype or "fp32"
    return reduced == "fp32" and not fsdp.cpu_offload and all(param.dtype == torch.float32 for param in params)


def loss_inputs(unit: TokenBatch, outputs: TokenOutputs, norm: Normalizers, device: torch.device) -> LossInputs:
    """What a loss is given of one unit."""
    columns = {name: values.to(device) for name, values in unit.columns.items()}
    if outputs.logprob_M is not None and Column.OLD_LOGPROB not in columns:
        columns[Column.OLD_LOGPROB] = outputs.logprob_M.detach()  # one mini-batch: the policy has not changed yet
    return LossInputs(
        logprob_M=outputs.logprob_M,
        entropy_M=outputs.entropy_M,
        value_M=outputs.value_M,
        columns=columns,
        seq_M=unit.seq_M.to(device),
        num_responses=unit.num_responses,
        norm=norm,
    )


def fetch_stats(reports: dict[int, LossOutputs]) -> dict[int, UnitStats]:
    """Statistics of all units, in one transfer from the device."""
    tensors = [value for report in reports.values() for value in (*report.shares.values(), *report.token_sums.values())]
    values = iter(torch.stack([value.detach().double() for value in tensors]).tolist() if tensors else [])
    return {
        index: UnitStats(
            shares={name: next(values) for name in report.shares},
            token_sums={name: next(values) for name in report.token_sums},
        )
        for index, report in reports.items()
    }
