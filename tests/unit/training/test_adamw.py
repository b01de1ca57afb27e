"""AdamW by pieces takes the steps of torch's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.training.fsdp import adamw, runs
from rlinf_lite.training.fsdp.state import build_optimizer

SIZES = ((3, 7), (64,), (0, 5), (), (4, 1, 33), (70_001,))


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("most", [100, 1 << 12, 1 << 18])
def test_all_bits_are_those_of_torch(dtype, weight_decay, most, monkeypatch):
    for module in (adamw, runs):
        monkeypatch.setattr(module, "MAX_ELEMENTS", most)
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    mine, theirs = parameters(dtype), parameters(dtype)
    optimizer = build_optimizer(mine, lr=1e-3, **options)
    native = torch.optim.AdamW(theirs, lr=1e-3, foreach=True, **options)
    for step in range(5):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape).to(dtype) * 10.0**-step
            other.grad = one.grad.clone()
        mine[1].grad = theirs[1].grad = (
            None if step == 2 else mine[1].grad
        )  # a parameter without a gradient is left out
        for each in (optimizer, native):
            each.param_groups[0]["lr"] = 1e-3 * (1 - step / 8)
            each.step()
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other)
            assert all(torch.equal(optimizer.state[one][key], native.state[other][key]) for key in native.state[other])


def test_hooks_are_called():
    (param,) = params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = build_optimizer(params, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(param.tolist()))
    param.grad = torch.ones(3)
    optimizer.step()
    assert seen == [[1.0, 1.0, 1.0]] and param.tolist() != [1.0, 1.0, 1.0]
