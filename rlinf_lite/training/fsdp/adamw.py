"""AdamW for a CPU: the steps of torch's own, bit for bit, on pieces that stay in the processor's cache.

torch reads and writes whole parameters and optimizer states once per operation, eight times, and through DTensor's
dispatch. Here a large parameter is taken in pieces, and small ones are taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rlinf_lite.training.fsdp.runs import MAX_ELEMENTS, flat, runs


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
            trained = [param for param in group["params"] if param.grad is not None]
            counts = self._count(trained)
            for count, members in groupby(zip(counts, trained, strict=True), key=lambda pair: pair[0]):
                self._step_all(group, count, [param for _, param in members])
        return None

    def _count(self, params: Sequence[Tensor]) -> list[float]:
        """Count one step more of each parameter; returns the numbers of steps."""
        if not params:
            return []
        steps = [self.state[param]["step"] for param in params]
        counted = torch.stack(steps) + 1.0
        torch._foreach_copy_(steps, counted.unbind())
        return counted.tolist()

    def _step_all(self, group: dict[str, Any], count: float, params: Sequence[Tensor]) -> None:
        states = [self.state[param] for param in params]
        each = [flat(param) for param in params]
        grads = [flat(param.grad) for param in params if param.grad is not None]
        first, second = ([flat(state[moment]) for state in states] for moment in ("exp_avg", "exp_avg_sq"))
        for run in runs(each):
            if run.stop - run.start == 1:
                _step(group, count, each[run.start], grads[run.start], first[run.start], second[run.start])
                continue
            changed = each[run], first[run], second[run]
            p, m, v = (torch.cat(parts) for parts in changed)
            _step(group, count, p, torch.cat(grads[run]), m, v)
            sizes = [part.numel() for part in each[run]]
            for parts, values in zip(changed, (p, m, v), strict=True):
                torch._foreach_copy_(parts, values.split(sizes))


def _step(group: dict[str, Any], count: float, param: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    decay = 1 - lr * group["weight_decay"]
    step_size = (lr / (1 - beta1**count)) * -1
    correction = (1 - beta2**count) ** 0.5
    for p, g, m, v in zip(*(tensor.split(MAX_ELEMENTS) for tensor in (param, grad, first, second)), strict=True):
        if group["weight_decay"] != 0:
            p.mul_(decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(correction).add_(group["eps"]), value=step_size)
