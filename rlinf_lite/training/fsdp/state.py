"""The trainer's state for checkpoints: live tensors, saved without a copy and loaded in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from rlinf_lite.training.fsdp.adamw import CacheAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's first and second moment, by torch's names."""


def build_optimizer(
    params: list[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW with its state allocated from the start, so that every checkpoint has the same tensors."""
    optimizer = CacheAdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
    for param in params:
        zeros = {name: torch.zeros_like(param.detach()) for name in MOMENTS}
        optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
    return optimizer


def optimizer_state(
    params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """``{parameter name: {"step", "exp_avg", "exp_avg_sq"}}``. Rates and betas come from the config."""
    return {name: dict(optimizer.state[param]) for name, param in params.items()}


@torch.no_grad()
def first_non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor with a NaN or an infinity in this process's shard, or None. Not collective.

    A sum is not finite if one element is not. It may also overflow, so only then each element is checked.
    """
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    if sums_are_finite(list(local.values())):
        return None
    return next((name for name, tensor in local.items() if not torch.isfinite(tensor).all()), None)


def sums_are_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether the sum of each tensor is finite in float32, whatever the tensors' type: fp16's maximum is 65504.

    Args:
        tensors: on one device; one may be empty.
    """
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


class GradScalerState(Stateful):
    """The two numbers of a GradScaler that training changes."""

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = self._scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float64),
            "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scaler.load_state_dict(
            {
                **self._scaler.state_dict(),
                "scale": state_dict["scale"].item(),
                "_growth_tracker": int(state_dict["growth_tracker"].item()),
            }
        )
