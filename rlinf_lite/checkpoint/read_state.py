"""Reading a DCP folder in one process, without the model that wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlinf_lite.checkpoint.safe_reader import SafeReader, TensorsOnlyPlanner, read_metadata


def tensor_names(actor_dir: Path) -> list[str]:
    """Names of all tensors in the folder; other entries are passed over."""
    held = read_metadata(actor_dir).state_dict_metadata
    return sorted(name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata))


def read_tensors(actor_dir: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The whole tensors whose names are ``wanted``, put together from all shards, in CPU memory."""
    held = read_metadata(actor_dir).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in held.items()
        if isinstance(entry, TensorStorageMetadata) and wanted(name)
    }
    if tensors:
        dcp.load(tensors, storage_reader=SafeReader(actor_dir), planner=TensorsOnlyPlanner(), no_dist=True)
    return tensors
