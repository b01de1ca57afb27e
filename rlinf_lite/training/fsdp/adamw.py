"""AdamW for a CPU: the steps of torch's own, bit for bit, on pieces of a parameter that stay in the processor's cache.

torch reads and writes whole parameters and optimizer states once per operation, eight times, and through DTensor's
dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_PIECE = 1 << 18
"""Elements at a time. With fewer, calling operations, and waking threads for them, takes longer than they do."""


class CacheAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose steps of float32 parameters on a CPU are made piece by piece; its state is the same.

    Decay is decoupled, and neither ``amsgrad`` nor ``maximize`` is set.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        if closure is not None or any(param.dtype != torch.float32 or param.is_cuda for param in params):
            return super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _step(group, self.state[param], param, param.grad)
        return None


def _step(group: dict[str, Any], state: dict[str, Tensor], param: Tensor, grad: Tensor) -> None:
    state["step"] += 1.0
    taken, (beta1, beta2), lr = state["step"].item(), group["betas"], group["lr"]
    decay = 1 - lr * group["weight_decay"]
    step_size = (lr / (1 - beta1**taken)) * -1
    correction = (1 - beta2**taken) ** 0.5
    tensors = [_flat(tensor) for tensor in (param, grad, state["exp_avg"], state["exp_avg_sq"])]
    for p, g, first, second in zip(*(tensor.split(_PIECE) for tensor in tensors), strict=True):
        if group["weight_decay"] != 0:
            p.mul_(decay)
        first.lerp_(g, 1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(first, second.sqrt().div_(correction).add_(group["eps"]), value=step_size)


def _flat(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.view(-1)
