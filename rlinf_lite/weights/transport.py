"""Weights across a process border: packed pieces for the object store, or a broadcast from actor to rollout workers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.weights.pieces import WeightPiece

PackedWeights = dict[str, tuple[int, str, np.ndarray]]
"""``{name: (first row, dtype name, bytes of the rows, uint8; the last dimension is in bytes)}``."""
_TIMEOUT = timedelta(minutes=10)


def pack(pieces: Iterable[WeightPiece]) -> PackedWeights:
    """As numpy arrays, which the object store keeps outside of the pickle, so that readers map them without a copy."""
    return {name: (first_row, str(rows.dtype).removeprefix("torch."), _bytes(rows)) for name, first_row, rows in pieces}


def _bytes(tensor: Tensor) -> np.ndarray:
    # numpy has no bfloat16, so bytes. A 0-d tensor has no last dimension to view as bytes.
    return tensor.contiguous().cpu().reshape(tensor.shape or (1,)).view(torch.uint8).numpy()


def unpack(packed: PackedWeights) -> Iterator[WeightPiece]:
    """The pieces that `pack` was given, without empty ones; still in shared memory, read-only."""
    for name, (first_row, dtype, data) in packed.items():
        if data.size:
            yield WeightPiece(name, first_row, _read_only(data).view(getattr(torch, dtype)))


def _read_only(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # about memory that must not be written; nothing here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data.reshape(-1), dtype=torch.uint8).reshape(data.shape)


class Broadcaster:
    """A process group between actor rank 0, which sends, and the rollout workers."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, device: torch.device) -> None:
        prefixed = dist.PrefixStore("weights", store)
        self._group: Any
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, _TIMEOUT)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill ``tensor`` in place with the sender's; returns it."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()
        return tensor
