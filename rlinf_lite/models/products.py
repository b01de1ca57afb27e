"""Matrix products of linear layers on a CPU in float32, by oneDNN instead of the BLAS library that torch calls.

oneDNN adds up the terms of an element one after the other, whatever the number of rows, as long as there are two, and
of threads. And it is faster: on an AMD processor MKL seems not to use AVX-512, and reads a weight for few rows at
half the speed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

_linear_pointwise: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
"""oneDNN's product. It returns sooner if it is given two dimensions."""
_FEW_ROWS = 64
"""For which oneDNN chooses the layout of a weight. Without a number it takes twice as long."""
_LONGEST_STEP = 64
"""Between numbers of rows that are computed, see `padded`."""


@functools.cache
def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def is_available() -> bool:
    """Whether this torch has oneDNN, with kernels for this processor."""
    has_operation = _linear_pointwise is not None
    return torch.backends.mkldnn.is_available() and has_operation and _capability() in ("AVX2", "AVX512")


def padded(num: int) -> int:
    """How many rows to compute instead of ``num``: oneDNN compiles a kernel for every shape, which takes milliseconds.

    A multiple of 4. From 64 on at most 1/16 more, and never more than 63.
    """
    step = 1 << max(2, num.bit_length() - 5)
    return num + -num % min(step, _LONGEST_STEP)


def rounded_down(num: int) -> int:
    """A number of rows that is not padded, 4 or more."""
    return max(4, num - num % (_LONGEST_STEP if num >= _LONGEST_STEP else 4))


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` and `linear` compute these by oneDNN."""
    return x.dtype is weight.dtype is torch.float32 and x.is_cpu and is_available()


def product(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` [..., N], without gradients.

    Args:
        x: [..., K]; two rows at least, or they are another product, which rounds differently.
        weight_NK: or what `packed` made of it.
    """
    if takes(x, weight_NK):
        found = _linear_pointwise(x.flatten(0, -2), weight_NK, bias_N, "none", [], "")
        return found.view(*x.shape[:-1], found.shape[-1])
    return functional.linear(x, weight_NK, bias_N)


def product_into(out: Tensor, x_MK: Tensor, weight_NK: Tensor) -> None:
    """Write ``x @ weight.T`` into ``out`` [M, N]."""
    if takes(x_MK, weight_NK):
        out.copy_(product(x_MK, weight_NK, None))
    else:
        torch.mm(x_MK, weight_NK.t(), out=out)


def packed(weight_NK: Tensor) -> Tensor:
    """A copy in oneDNN's own layout of a weight that it `takes`. With few rows `product` then takes half the time."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK, _FEW_ROWS)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `product`, with gradients (once)."""
    if not torch.is_grad_enabled():
        return product(x, weight_NK, bias_N)
    if takes(x, weight_NK) and x.dim() > 1 and x.numel():
        return _Linear.apply(x, weight_NK, bias_N)
    return functional.linear(x, weight_NK, bias_N)


def use(module: nn.Module) -> None:
    """Let the linear layers inside ``module`` compute with `linear`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
        elif type(layer) is Conv1D:
            layer.forward = functools.partial(_forward_transposed, layer)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _forward_transposed(layer: Conv1D, x: Tensor) -> Tensor:
    return linear(x, layer.weight.t(), layer.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return product(x, weight_NK, bias_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_MN = grad.flatten(0, -2)
        return (
            product(grad, weight_NK.t(), None) if for_x else None,
            weight_gradient(grad_MN, x.flatten(0, -2)) if for_weight else None,
            grad_MN.sum(0) if for_bias else None,
        )


def for_gradients(x: Tensor) -> bool:
    """Whether `weight_gradient` takes oneDNN: with AVX2 MKL is as fast, and faster if the sizes are small."""
    return _capability() == "AVX512" and takes(x, x)


def weight_gradient(grad_MN: Tensor, x_MK: Tensor) -> Tensor:
    """``grad.T @ x`` [N, K]."""
    return product(grad_MN.t(), x_MK.t(), None) if for_gradients(x_MK) else grad_MN.t() @ x_MK
