"""Reading ``.metadata`` without running what it says: an allow-list, and a structure that holds together.

Stock DCP unpickles it freely (``FileSystemReader.read_metadata``).
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from pathlib import PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.storage import Folder

# What torch writes into `.metadata`, and nothing else. `posix`/`pathlib` paths appear in `storage_meta`.
_ALLOWED: dict[str, frozenset[str]] = {
    "torch": frozenset({"Size", "device"})
    | frozenset(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "SerializationFormat"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed._shard.sharded_tensor.metadata": frozenset({"TensorProperties", "MEM_FORMAT_ENCODING"}),
    "collections": frozenset({"OrderedDict", "defaultdict"}),
    "builtins": frozenset({"dict", "list", "tuple", "set", "int", "float", "bool", "str"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath", "Path"}),
}  # fmt: skip

UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip
"""What unpicklers raise over bytes that nobody meant to be read (found by flipping bits)."""

_FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # so Python 3.13 calls it
        if name not in _ALLOWED.get(module, frozenset()):
            raise UnsafeCheckpoint(f"{module}.{name}")
        return super().find_class(module, name)


def reading_error(what: str, error: Exception) -> DamagedCheckpoint:
    """The error of this package for one of `UNREADABLE`; torch's own text advises to switch the protection off."""
    foreign = _FOREIGN.search(str(error))
    if isinstance(error, UnsafeCheckpoint) or foreign:
        name = foreign.group(1) if foreign else str(error)
        return UnsafeCheckpoint(f"{what}: asks for {name}, which no checkpoint needs; it was not run")
    if isinstance(error, FileNotFoundError):
        return DamagedCheckpoint(f"{what}: is missing")
    reason = "not a pickle of tensors and plain values"
    if not isinstance(error, pickle.UnpicklingError):
        reason = next(iter(str(error).splitlines()), "")
    return DamagedCheckpoint(f"{what}: cannot be read ({type(error).__name__}: {reason})")


def read_metadata(actor_dir: Folder) -> Metadata:
    """The ``.metadata`` of a DCP folder.

    Raises:
        UnsafeCheckpoint: it asks for a class or function outside the allow-list, or for a file outside the folder.
        DamagedCheckpoint: it is no metadata.
    """
    file = actor_dir / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        _check_structure(metadata)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(f"{file}: is missing, so {actor_dir} is no DCP folder") from None
    except UNREADABLE as error:
        raise reading_error(str(file), error) from None
    for info in metadata.storage_data.values():
        if (
            PurePosixPath(info.relative_path).name != info.relative_path
            or (actor_dir / info.relative_path).is_symlink()
        ):
            raise UnsafeCheckpoint(f"{file}: names {info.relative_path!r}, outside of its folder")
    return metadata


def _check_structure(metadata: Metadata) -> None:
    """Raises TypeError (or what comes of a missing attribute) for pickles that are no metadata."""
    _expect(metadata, Metadata)
    _expect(metadata.state_dict_metadata, dict)
    for name, entry in metadata.state_dict_metadata.items():
        _expect(name, str)
        _expect(entry, TensorStorageMetadata | BytesStorageMetadata)
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
    _expect(metadata.storage_data, dict)
    for index, info in metadata.storage_data.items():
        _expect(index, MetadataIndex)
        _expect(info.relative_path, str)
        _expect(info.offset, int)
        _expect(info.length, int)


def _check_tensor(name: str, entry: TensorStorageMetadata) -> None:
    """Chunks that do not fill their tensor would leave the rest of it as it was in memory."""
    _expect(entry.properties.dtype, torch.dtype)
    for size in (entry.size, *(chunk.sizes for chunk in entry.chunks)):
        _expect(size, torch.Size)
        if min(size, default=0) < 0:
            raise ValueError(f"{name} has a negative size")
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
        raise ValueError(f"{name} is not covered by its chunks")


def _expect(value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where {kind} was expected")
