"""Reading DCP files without running what they say: an allow-list for ``.metadata``, and tensors only.

Stock DCP unpickles both freely (``FileSystemReader.read_metadata``, ``DefaultLoadPlanner.load_bytes``).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from rlinf_lite.checkpoint.errors import DamagedCheckpoint, UnsafeCheckpoint

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
    "pathlib._local": frozenset({"PosixPath", "PurePosixPath"}),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, frozenset()):
            raise UnsafeCheckpoint(f"asks for {module}.{name}, which no checkpoint needs; it was not run")
        return super().find_class(module, name)


def read_metadata(actor_dir: Path) -> Metadata:
    """The ``.metadata`` of a DCP folder.

    Raises:
        UnsafeCheckpoint: it asks for a class or function outside the allow-list.
        DamagedCheckpoint: it is no metadata.
    """
    file = actor_dir / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{file}: {error}") from None
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file}: missing, so {actor_dir} is no DCP folder") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata):
        raise DamagedCheckpoint(f"{file}: holds a {type(metadata).__name__}, not DCP metadata")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise UnsafeCheckpoint(f"{file}: names {info.relative_path!r}, outside of its folder")
    return metadata


class SafeReader(FileSystemReader):
    """DCP's file reader over `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class TensorsOnlyPlanner(DefaultLoadPlanner):
    """DCP's planner for states that hold tensors and nothing else, as ours do: no entry is ever unpickled."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UnsafeCheckpoint(f"entry {read_item.dest_index.fqn!r} is a pickled object where a tensor was asked for")


def missing_and_extra(wanted: Iterable[str], metadata: Metadata) -> tuple[list[str], list[str]]:
    """Keys asked for that the checkpoint lacks, and keys it has that were not asked for. Sorted."""
    asked, held = set(wanted), set(metadata.state_dict_metadata)
    return sorted(asked - held), sorted(held - asked)
