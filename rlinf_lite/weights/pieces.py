"""Weights in transit: rows of a tensor from one rank, joined to whole tensors where an engine needs them whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NamedTensor = tuple[str, Tensor]
_BUCKET_BYTES = 256 << 20


class WeightPiece(NamedTuple):
    """Consecutive rows (along dimension 0) of one weight, or the whole weight."""

    name: str
    first_row: int
    rows: Tensor


def copy_rows(target: Tensor, first_row: int, rows: Tensor) -> None:
    """Set ``rows`` of the whole weight ``target``, from ``first_row`` on; a scalar is set as a whole."""
    if target.dim():
        target[first_row : first_row + rows.shape[0]].copy_(rows)
    else:
        target.copy_(rows.reshape(()))


def join_rows(pieces: Iterable[WeightPiece], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[NamedTensor]:
    """Yield each tensor of ``shapes`` as soon as all its rows have arrived. A piece that is whole is not copied.

    Other pieces are kept without a copy until then; pieces from the object store are views of its memory.

    Raises:
        KeyError: a name that is not in ``shapes``.
        ValueError: rows are missing when ``pieces`` ends.
    """
    waiting: dict[str, dict[int, Tensor]] = {}
    missing = set(shapes)
    for name, first_row, rows in pieces:
        shape = shapes[name]
        if rows.numel() == torch.Size(shape).numel():
            missing.remove(name)
            yield name, rows.reshape(shape)
            continue
        parts = waiting.setdefault(name, {})
        parts[first_row] = rows
        if sum(part.shape[0] for part in parts.values()) == shape[0]:
            missing.remove(name)
            yield name, torch.cat([part for _, part in sorted(waiting.pop(name).items())])
    if missing:
        raise ValueError(f"rows are missing of {len(missing)} weights, for example {min(missing)}")


def buckets(weights: Iterable[NamedTensor], num_bytes: int = _BUCKET_BYTES) -> Iterator[list[NamedTensor]]:
    """Group tensors, in order, into lists of about ``num_bytes``: one transfer each to a tensor-parallel engine."""
    bucket: list[NamedTensor] = []
    held_bytes = 0
    for name, tensor in weights:
        bucket.append((name, tensor))
        held_bytes += tensor.nbytes
        if held_bytes >= num_bytes:
            yield bucket
            bucket, held_bytes = [], 0
    if bucket:
        yield bucket
