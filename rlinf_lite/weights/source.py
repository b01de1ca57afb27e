"""Where weights come from. Three sources fit this page: `HfWeights`, `DcpWeights` and `LiveWeights`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rlinf_lite.weights.pieces import WeightPiece


class WeightSource(Protocol):
    """All weights of one model by their names in the model, read one tensor at a time.

    A source checks when it is built that it holds every weight.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every weight, in the model's order."""

    def dtype(self, name: str) -> torch.dtype:
        """The type in which ``name`` is stored."""

    def read(self, name: str) -> Tensor:
        """One whole tensor, as stored."""


def whole_pieces(source: WeightSource, dtype: torch.dtype) -> Iterator[WeightPiece]:
    """Every weight whole, in the model's order, as `RolloutEngine.load_weights` takes it."""
    for name in source.shapes:
        yield WeightPiece(name, 0, as_dtype(source.read(name), dtype))


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point tensors as ``dtype``, others unchanged."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
