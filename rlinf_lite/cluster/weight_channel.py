"""How weights cross a process border: packed rows for the object store, or a broadcast between actor and rollout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Pieces = dict[str, tuple[int, str, np.ndarray]]
"""``{name: (first row, dtype name, bytes of the rows, uint8 with the rows' shape in front of the last dimension)}``."""
_TIMEOUT = timedelta(minutes=10)


def pack(rows: Mapping[str, tuple[int, Tensor]]) -> Pieces:
    """As numpy arrays, which the object store keeps outside of the pickle, so that readers map them without a copy."""
    return {
        name: (start, str(tensor.dtype).removeprefix("torch."), _bytes(tensor))
        for name, (start, tensor) in rows.items()
    }


def _bytes(tensor: Tensor) -> np.ndarray:
    # numpy knows no bfloat16: bytes it is. A 0-d tensor has no last dimension to view through.
    return tensor.contiguous().reshape(tensor.shape or (1,)).view(torch.uint8).numpy()


def unpack(pieces: Pieces) -> Iterator[tuple[str, int, Tensor]]:
    """The (name, first row, rows) that `RolloutEngine.load_weights` takes; still in shared memory, read-only."""
    for name, (start, dtype, data) in pieces.items():
        if data.size:
            yield name, start, _read_only(data).view(getattr(torch, dtype))


def _read_only(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # about memory that may not be written; nothing here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data.reshape(-1), dtype=torch.uint8).reshape(data.shape)


class Broadcaster:
    """A process group of its own between actor rank 0 (the sender) and the rollout workers."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, device: torch.device) -> None:
        prefixed = dist.PrefixStore("weights", store)
        self._group: Any
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, _TIMEOUT)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill ``tensor`` with the sender's, in place; returns it."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()
        return tensor
