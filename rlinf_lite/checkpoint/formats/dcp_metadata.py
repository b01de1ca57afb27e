"""Reading ``.metadata`` without running what it says: an allow-list, and a structure that holds together.

Stock DCP unpickles it freely (``FileSystemReader.read_metadata``).
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
from rlinf_lite.checkpoint.storage import StoragePath, read_small

_MOST_BYTES = 1 << 30
_MAX_CUT_DIMS = 4  # shards are cut in one dimension, or in two
_FILE_NAME = re.compile(r"[\w.-]*[\w-][\w.-]*", re.ASCII)


class _Record:
    """Stands in for an object of torch: what was said of it, and no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_Record): ...


class _Bytes(_Record): ...


def _enum_member(enum: Any, name: Any) -> _Record:
    """Stands in for ``getattr``: Python 3.11.0 to 3.11.3 write a member of an enum as that."""
    if enum is not _Record:
        raise ForeignName("builtins.getattr")
    return _Record()


class _Unpickler(SafeUnpickler):
    """Knows what torch writes into ``.metadata``, and nothing else."""

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
        # The directory's path, in `storage_meta`; Python 3.13 has another module for it.
        **dict.fromkeys(("pathlib", "pathlib._local"), dict.fromkeys(("PosixPath", "PurePosixPath", "Path"), _Record)),
    }  # fmt: skip

    def named(self, module: str, name: str) -> Any:
        if module == "torch":
            return self.size if name == "Size" else DTYPES.get(name)
        return self._records.get(module, {}).get(name)


def read_metadata(actor_dir: StoragePath) -> Metadata:
    """The ``.metadata`` of a DCP directory: names, shapes, and where each chunk lies. The rest is left out.

    Raises:
        UnsafeCheckpoint: it asks for a class or function outside the allow-list, or for a file outside the directory.
        DamagedCheckpoint: it is no metadata.
    """
    file = actor_dir / ".metadata"
    try:
        content = read_small(file, _MOST_BYTES)
        metadata = _metadata(_Unpickler(content).load(), len(content))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{file}: is missing, so {actor_dir} is no DCP directory") from None
    except UNREADABLE as error:
        raise reading_error(str(file), error) from None
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if not _FILE_NAME.fullmatch(name) or (actor_dir / name).is_symlink():
            raise UnsafeCheckpoint(f"{file}: names {name!r}, outside of its directory")
    return metadata


def _metadata(record: _Record, most_chunks: int) -> Metadata:
    """What a pickle of `Metadata` said, every part of it checked. Raises one of `UNREADABLE`.

    Args:
        most_chunks: of all tensors together; one that is named often could else take for ever.
    """
    entries = {_expect(name, str): entry for name, entry in record.state["state_dict_metadata"].items()}
    num_chunks = sum(len(entry.state["chunks"]) for entry in entries.values() if isinstance(entry, _Tensor))
    if num_chunks > most_chunks:
        raise ValueError(f"has {num_chunks} chunks in {most_chunks} bytes")
    return Metadata(
        {name: _entry(name, entry) for name, entry in entries.items()},
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
        raise TypeError("an entry whose place in its file is no number")
    if min(offset, length) < 0:
        raise ValueError(f"an entry of {length} bytes at {offset}")
    if record.state.get("transform_descriptors"):
        raise ValueError("its entries are compressed or otherwise transformed")
    return _StorageInfo(_expect(path, str), offset, length)


def _check_covered(name: str, entry: TensorStorageMetadata) -> None:
    """Chunks that do not fill their tensor, each place once, would leave the rest of it as it was in memory.

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
    if 0 not in entry.size and any(_corners(name, whole, entry.chunks)):
        raise ValueError(f"{name} is not covered by its chunks, each place once")


def _corners(name: str, whole: ChunkStorageMetadata, chunks: Sequence[ChunkStorageMetadata]) -> Iterable[int]:
    """All zero just if the chunks fill the whole, each place once: then the corners of the boxes, counted with
    alternating signs, cancel with its own."""
    cut = [
        dim
        for dim, length in enumerate(whole.sizes)
        if any((chunk.offsets[dim], chunk.sizes[dim]) != (0, length) for chunk in chunks)
    ]
    if len(cut) > _MAX_CUT_DIMS:
        raise ValueError(f"{name} is cut in {len(cut)} dimensions")
    counts: Counter[tuple[int, ...]] = Counter()
    for sign, chunk in ((-1, whole), *((1, chunk) for chunk in chunks)):
        edges = [((chunk.offsets[dim], 1), (chunk.offsets[dim] + chunk.sizes[dim], -1)) for dim in cut]
        for corner in itertools.product(*edges):
            counts[tuple(at for at, _ in corner)] += sign * math.prod(way for _, way in corner)
    return counts.values()


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where {kind} was expected")
    return value
