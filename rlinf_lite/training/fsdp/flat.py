"""The slices that FSDP1 leaves of parameters, as rows: checkpoints and engines know no slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Nested: TypeAlias = "Tensor | Mapping[str, Nested]"


class Slices:
    """Which elements of each flattened parameter every rank has: consecutive ones, in the order of the ranks."""

    def __init__(
        self, params: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]], mesh: DeviceMesh
    ) -> None:
        """Collective.

        Args:
            params: this rank's slices, by the parameters' names.
            shapes: of the whole parameters.
        """
        self._mesh, self._shapes = mesh, shapes
        mine: Any = [param.numel() for param in params.values()]
        found: list[Any] = [None] * mesh.size()
        dist.all_gather_object(found, mine, group=mesh.get_group())
        self._sizes = dict(zip(params, zip(*found, strict=True), strict=True))
        """By name: elements on each rank."""

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def whole(self, name: str, own: Tensor) -> Tensor:
        """Gather a parameter, or a moment of it, on every rank. Collective.

        Args:
            own: this rank's slice.
        """
        sizes, group = self._sizes[name], self._mesh.get_group()
        padded = own.new_zeros(max(sizes))  # ranks may have different numbers of elements
        padded[: own.numel()] = own.detach().flatten()
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=group)
        parts = [part[:size] for part, size in zip(found, sizes, strict=True)]
        return torch.cat(parts).view(self._shapes[name])

    def rows(self, name: str, own: Tensor) -> tuple[Tensor, int]:
        """This rank's rows of `whole`, as FSDP2 gives them to it, and the first row's index. A copy. Collective."""
        whole = self.whole(name, own)
        shape, offset = compute_local_shape_and_global_offset(whole.shape, self._mesh, [Shard(0)])
        return whole[offset[0] : offset[0] + shape[0]].clone(), offset[0]

    def as_fsdp2(self, name: str, own: Tensor) -> DTensor:
        """`rows` of all ranks as one tensor. Collective."""
        rows, _ = self.rows(name, own)
        shape = torch.Size(self._shapes[name])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def put_back(self, name: str, own: Tensor, tensor: DTensor) -> None:
        """Copy this rank's slice of ``tensor`` to ``own``. Collective."""
        sizes, rank = self._sizes[name], self._mesh.get_local_rank()
        first = sum(sizes[:rank])
        own.view(-1).copy_(tensor.full_tensor().flatten()[first : first + sizes[rank]])


class RowState(Stateful):
    """Slices for checkpoints, in the form that FSDP2's have: the same names, shapes, types and rows per rank.

    They are copies: as much memory again as the state itself, and a gather of each tensor over the ranks, when this is
    made, and one more when it is loaded.
    """

    def __init__(self, slices: Slices, live: Mapping[str, Nested]) -> None:
        """Collective.

        Args:
            live: by parameter: a slice, or several in a dict. Other tensors are passed on as they are.
        """
        self._slices, self._live = slices, live
        self._rows = {name: self._as_rows(name, value) for name, value in live.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._rows

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective."""
        for name, value in self._live.items():
            self._put_back(name, value, state_dict[name])

    def _as_rows(self, name: str, value: Nested) -> Nested:
        if isinstance(value, Mapping):
            return {part: self._as_rows(name, tensor) for part, tensor in value.items()}
        return self._slices.as_fsdp2(name, value) if self._is_slice(name, value) else value

    def _put_back(self, name: str, value: Nested, loaded: Any) -> None:
        if isinstance(value, Mapping):
            for part, tensor in value.items():
                self._put_back(name, tensor, loaded[part])
        elif self._is_slice(name, value):
            self._slices.put_back(name, value, loaded)

    def _is_slice(self, name: str, tensor: Tensor) -> bool:
        return name in self._slices and tensor.dim() > 0  # not AdamW's number of steps
