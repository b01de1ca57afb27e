"""Reads and writes the format of ``torch.save`` in memory: without copies, and fast for many small tensors.

Reading uses an allow-list, so nothing in a file runs; damaged bytes raise an error and never read outside the file.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, cast

import torch

from rlinf_lite.checkpoint.formats.unpickling import DTYPES, UNREADABLE, SafeUnpickler

STORAGES = {
    "BFloat16Storage": torch.bfloat16, "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
    "CharStorage": torch.int8, "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "IntStorage": torch.int32, "LongStorage": torch.int64, "ShortStorage": torch.int16,
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30
_KEY_BYTES = 256
EDGE_BYTES = 64 << 10
"""Of a large entry, before and after the values: room for what torch writes there, and for the padding."""
_MOST_FORM_BYTES = 4 << 20  # larger tensors are few, and finding out their form takes their size in memory


def decode(content: memoryview, unpickler: type[TensorUnpickler] | None = None) -> Any:
    """Read what ``torch.save`` wrote: plain values, tensors, and nests of them. Tensors are views of ``content``.

    Args:
        content: the whole file, in writable memory.
        unpickler: knows further names; None reads no others than those.

    Raises:
        one of `UNREADABLE`: it holds anything else, or is damaged.
    """
    records = _records(content)
    names = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise ValueError("not a file that torch.save wrote")
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        raise ValueError("a TorchScript program instead of tensors and plain values")
    if bytes(records.get(f"{prefix}byteorder", b"little")) != b"little":
        raise ValueError("its bytes are not in little-endian order")
    return (unpickler or TensorUnpickler)(
        records[names[0]], {name.removeprefix(f"{prefix}data/"): part for name, part in records.items()}
    ).load()


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What the files of two tensors have in common if only their values differ."""

    head: bytes
    """All bytes before the values."""
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        """Where the values end."""
        return len(self.head) + self.shape.numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one index in the first dimension."""
        return self.shape[1:].numel() * self.dtype.itemsize

    def fits(self, content: memoryview) -> bool:
        return content[: len(self.head)] == self.head

    def tensor(self, content: memoryview) -> torch.Tensor:
        count = self.shape.numel()
        return torch.frombuffer(content, dtype=self.dtype, count=count, offset=len(self.head)).view(self.shape)


class EntryDecoder:
    """`decode` for many entries, each holding one tensor: a form that was seen before is not parsed again."""

    def __init__(self) -> None:
        self._forms: dict[tuple[int, bytes], Form] = {}

    def decode(self, content: memoryview) -> Any:
        """As the function."""
        if (form := self._known(content)) is not None:
            return form.tensor(content)
        value = decode(content)
        self._learn(content, value)
        return value

    def form(self, num_bytes: int, read: Callable[[int, memoryview], None]) -> Form | None:
        """The form of a large entry, of which only the first and last bytes are read.

        Args:
            num_bytes: of the whole entry; more than twice `EDGE_BYTES`.
            read: fills memory with the bytes of the entry from an offset on.

        Returns:
            None if the values do not lie between those bytes, or the entry cannot be read: then `decode` tells why.
        """
        content = memoryview(mmap.mmap(-1, num_bytes))  # what is not written or read of it takes no memory
        read(0, content[:EDGE_BYTES])
        form = self._known(content)
        if form is None:
            read(num_bytes - EDGE_BYTES, content[-EDGE_BYTES:])
            with suppress(*UNREADABLE):
                form = self._learn(content, decode(content))
        if form is None or len(form.head) > EDGE_BYTES:  # otherwise zeros may have been taken for a record's header
            return None
        return form if num_bytes - EDGE_BYTES <= form.end <= num_bytes else None

    def _known(self, content: memoryview) -> Form | None:
        form = self._forms.get((len(content), bytes(content[:_KEY_BYTES])))
        return form if form is not None and form.fits(content) else None

    def _learn(self, content: memoryview, value: Any) -> Form | None:
        if not (isinstance(value, torch.Tensor) and value.numel() and value.is_contiguous()):
            return None
        start = value.data_ptr() - torch.frombuffer(content, dtype=torch.uint8).data_ptr()
        form = Form(head=bytes(content[:start]), dtype=value.dtype, shape=value.shape)
        self._forms[len(content), bytes(content[:_KEY_BYTES])] = form
        return form


class EntryEncoder:
    """Writes tensors byte for byte as ``torch.save`` does, but calls it only for the first tensor of each form.

    Zip checksums are left out, because the whole file is hashed.
    """

    def __init__(self) -> None:
        self._forms: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}

    def write(self, tensor: torch.Tensor, file: IO[bytes]) -> int:
        """Return the number of bytes written.

        Args:
            tensor: on the CPU, without gradients, its storage no larger than itself.
        """
        if not 0 < tensor.nbytes <= _MOST_FORM_BYTES or not tensor.is_contiguous():
            start = file.tell()
            _save(tensor, file)
            return file.tell() - start
        key = tensor.dtype, tensor.shape
        if (form := self._forms.get(key)) is None:
            form = self._forms[key] = _around_values(tensor)
        head, tail = form
        values = tensor.view(-1).view(torch.uint8).numpy().data
        file.write(head)
        file.write(values)
        file.write(tail)
        return len(head) + len(values) + len(tail)


def _save(tensor: torch.Tensor, stream: IO[bytes]) -> None:
    # This setting is global: a torch.save in another thread may lack checksums too, which is harmless.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, stream)
    finally:
        torch.serialization.set_crc32_options(before)


def _around_values(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    """The bytes before and after the values of a contiguous tensor of this form."""
    stream = io.BytesIO()
    _save(tensor, stream)
    content = stream.getbuffer()
    start = decode(content).data_ptr() - torch.frombuffer(content, dtype=torch.uint8).data_ptr()
    return bytes(content[:start]), bytes(content[start + tensor.nbytes :])


def _records(content: memoryview) -> dict[str, memoryview]:
    """The records of a zip archive, as views of ``content``.

    Raises:
        ValueError: a record is compressed, which ``torch.save`` never does.
        EOFError: a record ends after ``content`` does.
    """
    with zipfile.ZipFile(cast(BinaryIO, _View(content))) as archive:
        return {info.filename: _record(content, info) for info in archive.infolist()}


def _record(content: memoryview, info: zipfile.ZipInfo) -> memoryview:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"its record {info.filename!r} is compressed")
    header = content[info.header_offset : info.header_offset + _LOCAL_HEADER_BYTES]
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    if info.header_offset < 0 or start + info.file_size > len(content):
        raise EOFError(f"ends before its record {info.filename!r} does")
    return content[start : start + info.file_size]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Storage:
    raw: memoryview
    dtype: torch.dtype
    num_bytes: int


class TensorUnpickler(SafeUnpickler):
    """Knows the names that ``torch.save`` writes for tensors and plain values."""

    def __init__(self, content: memoryview, storages: dict[str, memoryview]) -> None:
        super().__init__(content)
        self._storages = storages
        self._names: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_bytes,
            ("torch.storage", "UntypedStorage"): torch.uint8,
            ("torch", "Size"): torch.Size,
            ("torch", "device"): torch.device,
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): self._bytes,  # how protocol 2 writes bytes
            ("__builtin__", "set"): set,  # protocol 2 uses Python 2's names
            ("__builtin__", "complex"): complex,
        }

    def named(self, module: str, name: str) -> Any:
        if module == "torch" and (found := STORAGES.get(name) or DTYPES.get(name)):
            return found
        return self._names.get((module.replace("builtins", "__builtin__"), name))

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or type(key) is not str or not isinstance(dtype, torch.dtype) or type(count) is not int:
            raise ValueError("refers to something that is not a storage")
        raw, num_bytes = self._storages[key], count * dtype.itemsize
        if not 0 <= num_bytes <= len(raw):
            raise EOFError(f"storage {key!r} of {num_bytes} bytes has {len(raw)}")
        return _Storage(raw=raw, dtype=dtype, num_bytes=num_bytes)

    def _tensor(
        self, storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> torch.Tensor:
        return self._tensor_of_bytes(storage, offset, size, stride, requires_grad, hooks, storage.dtype, metadata)

    def _tensor_of_bytes(
        self, storage: Any, offset: int, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """Stands in for torch's ``_rebuild_tensor_v3``: a view of a storage, checked to lie within it."""
        shape, steps = torch.Size(size), torch.Size(stride)
        if metadata or len(shape) != len(steps) or min([offset, *shape, *steps]) < 0:
            raise ValueError("not a plain tensor")
        num_stored = storage.num_bytes // dtype.itemsize
        last = offset + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
        if math.prod(shape) > num_stored or (math.prod(shape) and last >= num_stored):
            raise ValueError(f"a tensor of shape {list(shape)} over {num_stored} stored elements")
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(storage.raw, dtype=dtype, count=num_stored).as_strided(shape, steps, offset)

    def _bytes(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError("text where bytes were expected")
        return text.encode(encoding)


class _View(io.RawIOBase):
    """Memory as a readable file, without the copy that `io.BytesIO` makes."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        count = max(0, min(len(target), len(self._view) - self._at))
        target[:count] = self._view[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence])
        return self._at

    def tell(self) -> int:
        return self._at
