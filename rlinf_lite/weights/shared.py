"""Weights written by the policy into the very memory of an engine in another process: CUDA IPC on one GPU.

It works on a CPU, too, which is for tests: processes that are killed there leave files in /dev/shm.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # registers with ForkingPickler how tensors are shared
from torch import Tensor

from rlinf_lite.weights.pieces import NamedTensor, WeightPiece, copy_rows

SharedWeights = dict[str, bytes]
"""By name: what another process on the same device needs to open the tensor."""


def export(weights: Iterable[NamedTensor]) -> SharedWeights:
    """Let other processes open ``weights``, whose memory stays this process's."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # the other one sends file descriptors, which Ray cannot
    try:
        return {name: bytes(ForkingPickler.dumps(tensor.detach())) for name, tensor in weights}
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class OpenWeights:
    """The weights of engines in other processes, which this one may write while they do not use them."""

    def __init__(self, engines: Sequence[SharedWeights]) -> None:
        """
        Args:
            engines: from `export`, of processes that still run.
        """
        self._engines: list[Mapping[str, Tensor]] = [
            {name: pickle.loads(opener) for name, opener in engine.items()} for engine in engines
        ]

    @torch.no_grad()
    def write(self, pieces: Iterable[WeightPiece]) -> None:
        """Set the rows of ``pieces`` in every engine; returns when they are there."""
        device = None
        for name, first_row, rows in pieces:
            for engine in self._engines:
                device = engine[name].device
                copy_rows(engine[name], first_row, rows)
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
