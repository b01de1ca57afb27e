"""Reads the ``.metadata`` of a DCP directory through an allow-list, and checks that its parts agree.

torch's own reader (``FileSystemReader.read_metadata``) unpickles the file without restriction.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.formats.unpickling import DTYPES, UNREADABLE, ForeignName, SafeUnpickler, reading_error
from rlinf_lite.checkpoint.storage import StoragePath, read_file

_FILE_NAME = re.compile(r"[\w.-]*[\w-][\w.-]*", re.ASCII)


class _Record:
    """Stands in for an object of torch: its attributes without its behaviour."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Record): ...


class _Bytes(_Record): ...


def _enum_member(enum: Any, name: Any) -> _Record:
    """Stands in for ``getattr``, with which Python 3.11.0 to 3.11.3 pickle the member of an enum."""
    if enum is not _Record:
        raise ForeignName("builtins.getattr")
    return _Record()


class _Unpickler(SafeUnpickler):
    """Knows the names that torch writes into ``.metadata``, and no others."""

    buildable = _Record
    _records: ClassVar[dict[str, dict[str, Any]]] = {
        "torch.distributed.checkpoint.metadata": {
            "TensorStorageMetadata": _Tensor, "BytesStorageMetadata": _Bytes, "Metadata": _Record,
            "MetadataIndex": _Record, "ChunkStorageMetadata": _Record, "TensorProperties": _Record,
            "StorageMeta": _Record, "_MEM_FORMAT_ENCODING": _Record,
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo": _Record, "SerializationFormat": _Record},
        "torch.serialization": {"_get_layout": _Record},
        "torch.distributed._shard.sharded_tensor.metadata": {
            "TensorProperties": _Record, "MEM_FORMAT_ENCODING": _Record,
        },
        "builtins": {"getattr": _enum_member},
        # The path of the directory, in `storage_meta`; its module has another name in Python 3.13.
        **dict.fromkeys(("pathlib", "pathlib._local"), dict.fromkeys(("PosixPath", "PurePosixPath", "Path"), _Record)),
    }  # fmt: skip

    def named(self, module: str, name: str) -> Any:
        if module == "torch":
            return torch.Size if name == "Size" else DTYPES.get(name)
        return self._records.get(module, {}).get(name)


def read_metadata(directory: StoragePath) -> Metadata:
    """Read the ``.metadata`` of a DCP directory: names, shapes, and the place of each chunk. The rest is left out.

    Raises:
        UnsafeCheckpoint: it asks for a class or function outside the allow-list, or for a file outside the directory.
        DamagedCheckpoint: it is missing, cannot be read, or contradicts itself.
    """
    file = directory / ".metadata"
    try:
        metadata = _metadata(_Unpickler(read_file(file)).load())
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{file}: is missing, so {directory} is not a DCP directory") from None
    except UNREADABLE as error:
        raise reading_error(str(file), error) from None
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if not _FILE_NAME.fullmatch(name) or (directory / name).is_symlink():
            raise UnsafeCheckpoint(f"{file}: names {name!r}, outside of its directory")
    return metadata


def _metadata(record: _Record) -> Metadata:
    """Make a `Metadata` of its pickled attributes, and check every part. Raises one of `UNREADABLE`."""
    entries = record.state["state_dict_metadata"]
    return Metadata(
        {_expect(name, str): _entry(name, entry) for name, entry in entries.items()},
        storage_data={_index(index): _info(info) for index, info in record.state["storage_data"].items()},
    )


def _entry(name: str, record: _Record) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(record, _Bytes):
        return BytesStorageMetadata()
    state = _expect(record, _Tensor).state
    properties = state["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    chunks = [
        ChunkStorageMetadata(_expect(chunk.state["offsets"], torch.Size), _expect(chunk.state["sizes"], torch.Size))
        for chunk in state["chunks"]
    ]
    entry = TensorStorageMetadata(
        TensorProperties(dtype=_expect(dtype, torch.dtype)), _expect(state["size"], torch.Size), chunks
    )
    _check_covered(name, entry)
    return entry


def _index(record: _Record) -> MetadataIndex:
    offset = record.state.get("offset")
    return MetadataIndex(_expect(record.state["fqn"], str), None if offset is None else _expect(offset, torch.Size))


def _info(record: _Record) -> _StorageInfo:
    path, offset, length = (record.state[key] for key in ("relative_path", "offset", "length"))
    if type(offset) is not int or type(length) is not int:
        raise TypeError("the offset or length of an entry is not a number")
    if offset < 0 or length < 1:
        raise ValueError(f"an entry of {length} bytes at {offset}")
    if record.state.get("transform_descriptors"):
        raise ValueError("its entries are compressed or otherwise transformed")
    return _StorageInfo(_expect(path, str), offset, length)


def _check_covered(name: str, entry: TensorStorageMetadata) -> None:
    """Check that the chunks cover their tensor exactly once: a gap would be filled with whatever was in memory.

    Raises:
        ValueError: they do not.
    """
    whole = ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size)
    for chunk in (whole, *entry.chunks):
        if len(chunk.offsets) != len(entry.size) or len(chunk.sizes) != len(entry.size):
            raise ValueError(f"{name} has a chunk with another number of dimensions")
        for start, length, end in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
            if min(start, length) < 0 or start + length > end:
                raise ValueError(f"{name} has a chunk of size {list(chunk.sizes)} at {list(chunk.offsets)}")
    if 0 not in entry.size and not _is_covered(whole, entry.chunks):
        raise ValueError(f"{name} is not covered exactly once by its chunks")


def _is_covered(whole: ChunkStorageMetadata, chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether boxes, which lie within the whole one, cover it exactly once."""
    split = [
        dim
        for dim, length in enumerate(whole.sizes)
        if any((chunk.offsets[dim], chunk.sizes[dim]) != (0, length) for chunk in chunks)
    ]
    if not split:
        return len(chunks) == 1
    if len(split) == 1:  # as FSDP has it: one behind the other
        at, dim = 0, split[0]
        for start, length in sorted((chunk.offsets[dim], chunk.sizes[dim]) for chunk in chunks):
            if length and start != at:
                return False
            at += length
        return at == whole.sizes[dim]
    return not any(_corners(whole, chunks, split))


def _corners(
    whole: ChunkStorageMetadata, chunks: Sequence[ChunkStorageMetadata], split: Sequence[int]
) -> Iterable[int]:
    """Signed counts of the corners of all boxes, which are all zero if and only if the chunks cover the whole once.

    Args:
        split: the dimensions in which a chunk is not as long as the whole.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for sign, chunk in ((-1, whole), *((1, chunk) for chunk in chunks)):
        edges = [((chunk.offsets[dim], 1), (chunk.offsets[dim] + chunk.sizes[dim], -1)) for dim in split]
        for corner in itertools.product(*edges):
            counts[tuple(at for at, _ in corner)] += sign * math.prod(side for _, side in corner)
    return counts.values()


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where {kind} was expected")
    return value
