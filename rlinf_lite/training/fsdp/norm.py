"""The L2 norm of all gradients, and clipping by it: bit-exact however the elements are spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.node.exchange import NodeExchange
from rlinf_lite.training.fsdp.runs import MAX_ELEMENTS, joined

_BITS = 26
"""Bits per word: sums of up to 2^37 elements fit into 64 bits."""
_ADDED_TO_NORM = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


@torch.no_grad()
def gradient_norm(shards: Sequence[Tensor], group: dist.ProcessGroup, exchange: NodeExchange | None = None) -> float:
    """Compute sqrt(sum of squares) over the shards of all ranks. Collective.

    Squares are exact in float64. Each is split into two integers, relative to the largest one, and sums of integers do
    not depend on their order. Relative error: below n * 2^-53 for n elements.

    Args:
        shards: of this rank, floating point, on one device; one may be empty.
        exchange: between the ranks of ``group``, if there is one.

    Returns:
        The norm; NaN or infinity if an element is.
    """
    largest = _largest(shards, group, exchange)
    if not 0 < largest < math.inf:
        return largest
    exponent = math.frexp(largest)[1]
    words = shards[0].new_zeros(2, dtype=torch.int64)
    piece_size = 1 << 24 if words.is_cuda else MAX_ELEMENTS
    for part in joined(shards):
        for piece in part.split(piece_size):
            words += _words(piece, exponent)
    high, low = _over_ranks(words, dist.ReduceOp.SUM, group, exchange).tolist()
    return math.ldexp(math.sqrt((high * 2**_BITS + low) / 2 ** (2 * _BITS)), exponent)


@torch.no_grad()
def clip(shards: Sequence[Tensor], norm: float, limit: float) -> None:
    """Scale the gradients in place, so that their norm is at most ``limit``."""
    factor = limit / (norm + _ADDED_TO_NORM)
    if factor < 1:
        torch._foreach_mul_([*shards], factor)


def _largest(shards: Sequence[Tensor], group: dist.ProcessGroup, exchange: NodeExchange | None) -> float:
    """The largest absolute value of all ranks' gradients; NaN if there is one anywhere."""
    ends = [end.double().abs() for part in joined(shards) if part.numel() for end in part.aminmax()]
    mine = torch.stack([*ends, shards[0].new_zeros((), dtype=torch.float64)]).amax()
    # A maximum over ranks may lose a NaN (gloo's does), so it is a flag of its own.
    pair = torch.stack([mine.isnan().double(), mine.nan_to_num(nan=0.0, posinf=math.inf)])
    is_nan, largest = _over_ranks(pair, dist.ReduceOp.MAX, group, exchange).tolist()
    return math.nan if is_nan else largest


def _over_ranks(
    mine: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup, exchange: NodeExchange | None
) -> Tensor:
    """The sum (of integers) or maximum over all ranks, of which neither depends on their order."""
    if exchange is not None:
        every = torch.stack(exchange.show(mine))
        return every.amax(0) if op == dist.ReduceOp.MAX else every.sum(0)
    if group.size() > 1:
        dist.all_reduce(mine, op=op, group=group)
    return mine


def _words(piece: Tensor, exponent: int) -> Tensor:
    """Sum of squares relative to 2^(2 * exponent), in units of 2^-26 and of 2^-52: int64 [2].

    Sums of integers below 2^53 are exact in float64.
    """
    squares = piece.to(torch.float64, copy=True).mul_(2.0 ** (_BITS // 2 - exponent)).square_()
    whole = squares.floor()
    rest = squares.sub_(whole).mul_(2.0**_BITS).round_()
    return torch.stack([whole.sum(), rest.sum()]).long()
