"""Megatron's sequence parallelism: outside matrix products each tensor-parallel rank has a part of the tokens.

Tokens are divided into equal runs, one per rank, for residuals and norms. A column-parallel layer gathers the tokens of
all ranks; a row-parallel one sums its output over the ranks, and leaves each rank its own tokens. What a layer keeps
for the backward pass is a rank's own part, which is gathered again there. Megatron-core's layers do the same, on CUDA
only; these run on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from rlinf_lite.training.megatron.core import ColumnParallelLinear, RowParallelLinear


def own_tokens(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's tokens [N / ranks, ...] of ``hidden`` [N, ...], which is the same on each rank; N divides evenly."""
    own: Tensor = _OwnTokens.apply(hidden, group)
    return own


def all_tokens(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks, [N, ...]; each rank then must compute the same with them, and have the same gradient."""
    gathered: Tensor = _AllTokens.apply(hidden, group)
    return gathered


class GatheringLinear(ColumnParallelLinear):
    """Some rows of a matrix, for the tokens of all ranks."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[N / ranks, 1, D] -> [N, 1, rows]."""
        output: Tensor = _GatheringProduct.apply(input_, self.weight, self.tp_group)
        return output if self.bias is None else output + self.bias, None


class ScatteringLinear(RowParallelLinear):
    """Some columns of a matrix; the sum over the ranks for this rank's tokens."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[N, 1, columns] -> [N / ranks, 1, D]."""
        assert self.bias is None
        return _SumOfOwnTokens.apply(functional.linear(input_, self.weight), self.tp_group), None


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _own(hidden, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_outputs[0], ctx.group), None


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(hidden, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _own(grad_outputs[0], ctx.group), None


class _SumOfOwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_of_own(hidden, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_outputs[0], ctx.group), None


class _GatheringProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(own, weight)
        ctx.group = group
        return functional.linear(_gather(own, group), weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        own, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_own = _sum_of_own(grad.matmul(weight), ctx.group)
        return grad_own, grad.flatten(0, -2).t().matmul(_gather(own, ctx.group).flatten(0, -2)), None


def _own(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    return hidden.chunk(group.size())[group.rank()].clone()


def _gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    found = own.new_empty((group.size() * len(own), *own.shape[1:]))
    dist.all_gather_into_tensor(found, own.contiguous(), group=group)
    return found


def _sum_of_own(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    found = hidden.new_empty((len(hidden) // group.size(), *hidden.shape[1:]))
    dist.reduce_scatter_tensor(found, hidden.contiguous(), group=group)
    return found
