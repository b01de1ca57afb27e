"""Reading a DCP directory in one process, without the model that wrote it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader, check_size
from rlinf_lite.checkpoint.storage import StoragePath


def tensor_names(actor_dir: StoragePath) -> list[str]:
    """Names of all tensors in the directory; other entries are passed over."""
    held = read_metadata(actor_dir).state_dict_metadata
    return sorted(name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata))


def read_tensors(actor_dir: StoragePath, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The whole tensors whose names are ``wanted``, put together from all shards, in CPU memory. Sorted by name.

    Raises:
        UnsafeCheckpoint, DamagedCheckpoint: it asks for what no checkpoint needs, or cannot be read.
    """
    reader = ShardReader(actor_dir)
    entries = {
        name: entry
        for name, entry in sorted(reader.metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    check_size(actor_dir, entries)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    reader.read(tensors)
    return tensors
