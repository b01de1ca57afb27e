"""Reads whole tensors by name from a DCP directory, in one process and without the model that wrote it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader, check_size
from rlinf_lite.checkpoint.storage import StoragePath


def tensor_names(directory: StoragePath) -> list[str]:
    """The names of all tensors in the directory; entries that are not tensors are ignored."""
    held = read_metadata(directory).state_dict_metadata
    return sorted(name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata))


def read_tensors(directory: StoragePath, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """Read the tensors whose names are ``wanted`` into CPU memory, whole and sorted by name.

    Raises:
        UnsafeCheckpoint, DamagedCheckpoint: the directory asks for what no checkpoint needs, or cannot be read.
    """
    reader = ShardReader(directory)
    entries = {
        name: entry
        for name, entry in sorted(reader.metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    check_size(directory, entries)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    reader.read(tensors)
    return tensors
