"""Writes files as ``torch.save`` does, but reads each tensor only when it is to be written.

The pickle is made at once, so everything but the larger tensors is copied then.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from rlinf_lite.checkpoint.file_state import Copied, Lazy
from rlinf_lite.checkpoint.formats.tensor_file import STORAGES
from rlinf_lite.checkpoint.formats.zip_writer import ZipWriter
from rlinf_lite.checkpoint.live import exact

Held = torch.Tensor | Copied | Lazy
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


@dataclass(frozen=True, slots=True)
class _StorageOf:
    """Stands for the storage of tensor ``index`` in a pickle."""

    index: int
    dtype: torch.dtype
    count: int


@dataclass(kw_only=True, slots=True)
class TorchFile:
    """The content of a file, not yet written."""

    pickled: bytes = b""
    tensors: list[Held] = field(default_factory=list)
    """In the order in which they are written."""

    @classmethod
    def of(cls, content: object) -> TorchFile:
        """Pickle ``content``, all but its tensors.

        Raises:
            TypeError, AttributeError, pickle.PicklingError: it holds something that cannot be saved.
        """
        file, stream = cls(), io.BytesIO()
        _Pickler(stream, file.tensors).dump(content)
        file.pickled = stream.getvalue()
        return file

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        forms = (one.tensor if isinstance(one, Copied) else one for one in self.tensors)
        return sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)

    def write(self, stream: IO[bytes], reading: Callable[[Held], AbstractContextManager[torch.Tensor]]) -> None:
        """Write the file front to back, without zip checksums, because the whole of it is hashed.

        Args:
            reading: gives one of `tensors` in CPU memory, in a storage of just its size, for the time of a block.
        """
        archive = ZipWriter(stream)
        archive.add("archive/data.pkl", self.pickled)
        archive.add("archive/byteorder", sys.byteorder.encode())
        for index, held in enumerate(self.tensors):
            with reading(held) as tensor:
                archive.add(f"archive/data/{index}", _bytes(tensor))
        archive.add("archive/version", b"3\n")
        archive.finish()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def own(tensor: Copied | Lazy) -> AbstractContextManager[torch.Tensor]:
    """A tensor that nobody else changes, as `TorchFile.write` takes it."""
    held = tensor.tensor if isinstance(tensor, Copied) else tensor.make()
    return nullcontext(exact(held.detach().cpu()))


class _Pickler(pickle.Pickler):
    def __init__(self, stream: IO[bytes], tensors: list[Held]) -> None:
        super().__init__(stream, protocol=2)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageOf):
            return None
        return "storage", getattr(torch, _STORAGE_OF[obj.dtype]), str(obj.index), "cpu", obj.count

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor | Copied | Lazy):
            return NotImplemented
        form = obj.tensor if isinstance(obj, Copied) else obj
        if form.dtype not in _STORAGE_OF:
            raise TypeError(f"a tensor of {form.dtype}")
        shape = torch.Size(form.shape)
        storage = _StorageOf(len(self._tensors), form.dtype, shape.numel())
        self._tensors.append(obj)
        strides = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(shape), strides, False, OrderedDict())
