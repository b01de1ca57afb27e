"""Small tensors laid end to end: calling an operation for each takes longer than what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MAX_ELEMENTS = 1 << 18
"""The most elements of tensors laid end to end, and of one piece of a larger tensor: so many stay in a cache."""


def flat(tensor: Tensor) -> Tensor:
    """This rank's elements of a tensor, as one dimension: a view, so they must be contiguous."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def runs(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive tensors of at most `MAX_ELEMENTS` together; a larger one alone."""
    first = total = 0
    for place, tensor in enumerate(tensors):
        if place > first and total + tensor.numel() > MAX_ELEMENTS:
            yield slice(first, place)
            first, total = place, 0
        total += tensor.numel()
    if first < len(tensors):
        yield slice(first, len(tensors))


def joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The elements of each of the `runs`, as one dimension: a copy, unless there is but one tensor in it."""
    for run in runs(tensors):
        parts = [tensor.flatten() for tensor in tensors[run]]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)
