"""The weights of a model in memory, sharded by FSDP or not: reading them, a rank's own rows, and filling them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlinf_lite.weights.names import named_weights, weight_shapes
from rlinf_lite.weights.pieces import WeightPiece
from rlinf_lite.weights.source import as_dtype


class LiveWeights:
    """A `WeightSource` over a model. If it is sharded, `read` is collective: every rank reads the same names."""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        """
        Args:
            device: where whole tensors are gathered; None: where the parameters are.
        """
        self._tensors = dict(named_weights(model))
        self._device = device
        self.shapes: Mapping[str, tuple[int, ...]] = weight_shapes(model)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """Not a copy where nothing has to be gathered or moved."""
        tensor = self._tensors[name].detach()
        placed = tensor if self._device is None else tensor.to(self._device)
        return placed.full_tensor() if isinstance(placed, DTensor) else placed


def local_pieces(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[WeightPiece]:
    """This rank's rows of every weight, floating-point ones as ``dtype``: no row comes from two ranks.

    Not a copy where nothing has to be cast: then they are the live weights.

    Args:
        weights: the `named_weights` of a model.
    """
    meshes = {id(t.device_mesh): t.device_mesh for t in weights.values() if isinstance(t, DTensor)}
    is_first = all(mesh.get_local_rank() == 0 for mesh in meshes.values())
    for name, tensor in weights.items():
        if is_first or isinstance(tensor, DTensor):  # every rank has the others whole
            rows, first_row = local_rows(tensor)
            yield WeightPiece(name, first_row, as_dtype(rows, dtype))


@torch.no_grad()  # with gradients a sharded tensor returns its local part through autograd, which is slow
def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a tensor sharded over dimension 0 (all rows of a plain tensor), and the first row's index."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    return tensor.to_local().detach(), _first_row(tensor.shape, tensor.device_mesh, tensor.placements)


@functools.lru_cache(maxsize=4096)  # a step asks for every weight
def _first_row(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> int:
    _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return offset[0] if offset else 0


class RowSource(Protocol):
    """A source of which a rank can read its own rows alone."""

    def read_rows(self, name: str, first_row: int, num_rows: int) -> Tensor:
        """``num_rows`` rows as stored; a tensor without dimensions is read whole."""


@torch.no_grad()
def fill(model: nn.Module, source: RowSource) -> None:
    """Copy every weight from ``source`` into the model. Each rank reads only its own rows.

    Raises:
        ConfigError: a tensor cannot be read, or has another shape.
    """
    for name, tensor in named_weights(model):
        rows, first_row = local_rows(tensor)
        num_rows = rows.shape[0] if rows.dim() else 1
        stored = source.read_rows(name, first_row, num_rows)
        if rows.numel():
            rows.copy_(stored)
