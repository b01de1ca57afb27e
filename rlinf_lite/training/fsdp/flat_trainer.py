"""`FlatTrainer`: the `Trainer` over FSDP1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlinf_lite.config import FsdpConfig
from rlinf_lite.training.fsdp.flat import RowState, Slices
from rlinf_lite.training.fsdp.reduction import ReducedGradients
from rlinf_lite.training.fsdp.state import optimizer_state
from rlinf_lite.training.fsdp.trainer import FsdpTrainer
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.source import as_dtype


class FlatTrainer(FsdpTrainer):
    """One rank of a model sharded with FSDP1. Parameters, gradients and optimizer state are this rank's flat slices."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._slices = Slices(self._params, self.names.shapes, self.sharded.mesh)

    def _sum_of(self, params: list[nn.Parameter], fsdp: FsdpConfig) -> ReducedGradients:
        return ReducedGradients(params)

    def state(self) -> dict[str, Any]:
        """As `Trainer.state`, but collective, and of copies; see `RowState`."""
        return {
            "model": RowState(self._slices, self.sharded.live),
            "optim": RowState(self._slices, optimizer_state(self._params, self.optimizer)),
            "lr_scheduler": {"num_updates": self.num_updates},
        }

    def weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        """As `Trainer.weights`; collective."""
        for name, tensor in self.sharded.live.items():
            if name in self._slices:
                rows, first_row = self._slices.rows(name, tensor)
                yield WeightPiece(name, first_row, as_dtype(rows, dtype))
            elif self.rank == 0:  # every rank has the others whole
                yield WeightPiece(name, 0, as_dtype(tensor, dtype))

    def whole_weights(self, dtype: torch.dtype) -> Iterator[WeightPiece]:
        for name, tensor in self.sharded.live.items():
            whole = self._slices.whole(name, tensor) if name in self._slices else tensor
            yield WeightPiece(name, 0, as_dtype(whole, dtype))
