"""All weights in one region of shared memory, for processes of one machine on a CPU.

The region has no name in a file system: a process opens it through a living one that holds it, and it is gone with the
last of them, however they end.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlinf_lite.node.descriptors import RemoteDescriptor
from rlinf_lite.node.memory import make_memory
from rlinf_lite.weights.pieces import NamedTensor, WeightPiece, copy_rows

_ALIGNMENT = 64
"""Bytes; that of torch's own CPU memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one weight lies in a region."""

    offset: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: str
    """``float32``"""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


Layout = dict[str, Place]
"""By the weight's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionAddress:
    """How another process on the machine opens a region, while the one that made it lives."""

    memory: RemoteDescriptor
    layout: Layout


def layout_of(weights: Iterable[NamedTensor]) -> Layout:
    """One weight behind the other, in their order."""
    layout: Layout = {}
    end = 0
    for name, tensor in weights:
        dtype = str(tensor.dtype).removeprefix("torch.")
        layout[name] = Place(offset=end, shape=tuple(tensor.shape), dtype=dtype)
        end += -(-layout[name].num_bytes // _ALIGNMENT) * _ALIGNMENT
    return layout


class Region:
    """The weights of a layout, as tensors in memory that processes share."""

    def __init__(self, descriptor: int, layout: Layout, *, is_private: bool) -> None:
        """
        Args:
            descriptor: of the region; may be closed afterwards.
            is_private: what this process writes stays its own, and hides what others write to that page.
        """
        access = mmap.ACCESS_COPY if is_private else mmap.ACCESS_WRITE
        memory = torch.frombuffer(mmap.mmap(descriptor, 0, access=access), dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {
            name: memory[place.offset : place.offset + place.num_bytes].view(place.torch_dtype).reshape(place.shape)
            for name, place in layout.items()
        }

    @classmethod
    def make(cls, layout: Layout) -> tuple[Region, RegionAddress]:
        """Make a region, with memory for all of it; others can open it as long as this process has it.

        Raises:
            OSError: there is not enough memory, or this system has no such regions.
        """
        descriptor = make_memory(max(place.offset + place.num_bytes for place in layout.values()))
        try:
            region = cls(descriptor, layout, is_private=False)
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(region, os.close, descriptor)
        return region, RegionAddress(memory=RemoteDescriptor.of(descriptor), layout=layout)

    @classmethod
    def open(cls, address: RegionAddress, *, is_private: bool) -> Region:
        """Open a region that another process, or this one, has made.

        Raises:
            OSError: that process is not visible from here, may not be asked, or is gone.
        """
        descriptor = address.memory.open(os.O_RDWR)
        try:
            return cls(descriptor, address.layout, is_private=is_private)
        finally:
            os.close(descriptor)

    @torch.no_grad()
    def write(self, pieces: Iterable[WeightPiece]) -> None:
        """Set the rows of ``pieces``.

        Raises:
            KeyError: a name that the layout does not have.
        """
        for name, first_row, rows in pieces:
            copy_rows(self.tensors[name], first_row, rows)

    def become(self, weights: Iterable[NamedTensor]) -> None:
        """Let each of ``weights``, which the layout was made of or are like them, have its memory in the region."""
        for name, tensor in weights:
            assert tensor.shape == self.tensors[name].shape and tensor.dtype == self.tensors[name].dtype, name
            tensor.data = self.tensors[name]
