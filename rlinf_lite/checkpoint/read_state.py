"""Reading a DCP folder in one process, without the model that wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint.errors import DamagedCheckpoint
from rlinf_lite.checkpoint.safe_reader import (
    SafeReader,
    TensorsOnlyPlanner,
    dcp_errors,
    read_metadata,
    without_single_process_warning,
)


def tensor_names(actor_dir: Path) -> list[str]:
    """Names of all tensors in the folder; other entries are passed over."""
    held = read_metadata(actor_dir).state_dict_metadata
    return sorted(name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata))


def read_tensors(actor_dir: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The whole tensors whose names are ``wanted``, put together from all shards, in CPU memory. Sorted by name.

    Raises:
        UnsafeCheckpoint, DamagedCheckpoint: it asks for what no checkpoint needs, or cannot be read.
    """
    reader = SafeReader(actor_dir)
    entries = {
        name: entry
        for name, entry in sorted(reader.metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    _check_size(actor_dir, entries)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    if tensors:
        with dcp_errors(actor_dir), without_single_process_warning():
            dcp.load(tensors, storage_reader=reader, planner=TensorsOnlyPlanner(), no_dist=True)
    return tensors


def _check_size(actor_dir: Path, entries: dict[str, TensorStorageMetadata]) -> None:
    """Refuse tensors larger than the files that should hold them, before memory is taken for them."""
    asked = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries.values())
    there = sum(file.stat().st_size for file in actor_dir.iterdir() if file.is_file())
    if asked > there:
        raise DamagedCheckpoint(f"{actor_dir}: names tensors of {asked} bytes, but its files hold {there}")
