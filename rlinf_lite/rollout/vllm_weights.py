"""From pieces of tensors to the whole ones that vLLM's loaders take, a few layers at a time. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

Named = tuple[str, Tensor]
_BUCKET_BYTES = 256 << 20


def whole(pieces: Iterable[tuple[str, int, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Named]:
    """Each tensor of ``shapes`` as soon as all of its rows have come; one that comes whole is passed on uncopied.

    Pieces of others are kept as they are: those of the object store are views of its memory.

    Raises:
        KeyError: a name that is not in ``shapes``.
        ValueError: rows are missing when ``pieces`` ends.
    """
    waiting: dict[str, dict[int, Tensor]] = {}
    missing = set(shapes)
    for name, start, rows in pieces:
        shape = shapes[name]
        if rows.numel() == torch.Size(shape).numel():
            missing.remove(name)
            yield name, rows.reshape(shape)
            continue
        parts = waiting.setdefault(name, {})
        parts[start] = rows
        if sum(part.shape[0] for part in parts.values()) == shape[0]:
            missing.remove(name)
            yield name, torch.cat([part for _, part in sorted(waiting.pop(name).items())])
    if missing:
        raise ValueError(f"no or not all rows came of {len(missing)} weights, for example {min(missing)}")


def buckets(weights: Iterable[Named], num_bytes: int = _BUCKET_BYTES) -> Iterator[list[Named]]:
    """Lists of about ``num_bytes``: what crosses to the processes of a tensor-parallel engine in one go."""
    bucket: list[Named] = []
    held = 0
    for name, tensor in weights:
        bucket.append((name, tensor))
        held += tensor.nbytes
        if held >= num_bytes:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
