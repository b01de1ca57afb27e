"""Writes a sharded state as a DCP directory: which rank writes what, each rank's file, and ``.metadata``.

The plan is torch's own (`DefaultSavePlanner`), and any DCP reader can load the result. The bytes are written here, in
order and hashed, from live tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint.files import hashed, write_durably
from rlinf_lite.checkpoint.formats.tensor_file import EntryEncoder
from rlinf_lite.checkpoint.live import LiveTensors
from rlinf_lite.checkpoint.manifest import FileRecord
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.sections import Section
from rlinf_lite.checkpoint.storage import StoragePath

Resolve = Callable[[str, torch.Tensor], torch.Tensor]
Find = Callable[[WriteItem], torch.Tensor]
Signature = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """What this rank writes, and the metadata of its whole section."""

    items: list[WriteItem]
    metadata: Metadata
    signature: Signature

    def num_bytes(self) -> list[int]:
        """The size in memory of each item."""
        return [_num_bytes(item) for item in self.items]


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class ShardPlanner:
    """Plans with the other ranks of its section who writes what; all ranks take part.

    The plan is reused for states with the same names and shapes.
    """

    def __init__(self, ranks: Ranks, section: Section) -> None:
        self._ranks, self._section = ranks, section
        self._last: ShardPlan | None = None

    def plan(self, take: Callable[[], Mapping[str, Any]]) -> tuple[ShardPlan, Find]:
        """Plan the save of nested dicts of tensors. Collective.

        Args:
            take: returns the tensors of this rank. If it fails on one rank, all ranks raise its error.

        Returns:
            The plan, and a function that finds an item's tensor.
        """
        planner, ranks, section = DefaultSavePlanner(), self._ranks, self._section

        def is_as_last() -> bool:
            return self._is_as_last(planner, take())

        if not all(ranks.collect(is_as_last)):
            plans = ranks.collect(planner.create_local_plan)
            global_plan, metadata = planner.create_global_plan([plans[rank] for rank in section.ranks])
            signature = _signature(planner.state_dict)
            self._last = ShardPlan(items=global_plan[section.place].items, metadata=metadata, signature=signature)
        assert self._last is not None
        return self._last, cast(Find, planner.resolve_data)

    def last(self, tensors: Mapping[str, Any]) -> tuple[ShardPlan, Find] | None:
        """As `plan`, if the last plan fits the tensors of this rank, else None. Not collective: ranks may differ."""
        planner = DefaultSavePlanner()
        if not self._is_as_last(planner, tensors):
            return None
        assert self._last is not None
        return self._last, cast(Find, planner.resolve_data)

    def _is_as_last(self, planner: DefaultSavePlanner, tensors: Mapping[str, Any]) -> bool:
        planner.set_up_planner(dict(tensors), is_coordinator=self._section.is_first)
        return self._last is not None and self._last.signature == _signature(planner.state_dict)

    def current(self) -> ShardPlan:
        """The last plan."""
        assert self._last is not None
        return self._last

    def forget(self) -> None:
        """Plan anew next time, because after a failure ranks may remember different plans."""
        self._last = None


def _signature(flat: Mapping[str, Any]) -> Signature:
    return tuple(
        (name, tensor.dtype, tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None)
        for name, tensor in flat.items()
    )


def write_shard(
    path: StoragePath, plan: ShardPlan, live: LiveTensors, halfway: Callable[[], None]
) -> tuple[FileRecord, list[WriteResult]]:
    """Write this rank's items to ``path``, durably; each is read from ``live`` when it is to be written."""
    with hashed(path) as file:
        results = write_items(file, path.name, plan, live, EntryEncoder(), halfway)
    return file.record(), results


def write_items(
    file: io.RawIOBase,
    name: str,
    plan: ShardPlan,
    live: LiveTensors,
    encoder: EntryEncoder,
    halfway: Callable[[], None] = lambda: None,
) -> list[WriteResult]:
    """As `write_shard`, to an open file that will have the name ``name``."""
    results = []
    for index, item in enumerate(plan.items):
        if index == len(plan.items) // 2:
            halfway()
        offset = file.tell()
        with live.reading(index) as tensor:
            encoder.write(tensor, cast(IO[bytes], file))
        info = _StorageInfo(name, offset, file.tell() - offset)
        results.append(WriteResult(index=item.index, size_in_bytes=info.length, storage_data=info))
    return results


def write_metadata(path: StoragePath, plan: ShardPlan, results: list[list[WriteResult]]) -> FileRecord:
    """Write ``.metadata`` durably."""
    return write_durably(path, encode_metadata(plan, results))


def encode_metadata(plan: ShardPlan, results: list[list[WriteResult]]) -> bytes:
    """The content of ``.metadata``: the same bytes for the same state, so without the time and path that DCP adds."""
    one = _Unique()
    held = plan.metadata
    metadata = Metadata(
        {one.text(name): one.entry(entry) for name, entry in held.state_dict_metadata.items()},
        planner_data={one.text(name): tuple(map(one.text, parts)) for name, parts in held.planner_data.items()},
        storage_data={one.index(result.index): one.info(result.storage_data) for part in results for result in part},
    )
    metadata.version = CURRENT_DCP_VERSION
    return pickle.dumps(metadata)


class _Unique:
    """Makes equal parts of a `Metadata` one object, which a pickle then holds once.

    Otherwise the bytes would depend on which equal parts happen to be the same object.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, Any] = {}

    def text(self, value: Any) -> Any:
        """For names, and for the parts of a path, which may be numbers."""
        return self._seen.setdefault((type(value), value), value)

    def size(self, value: torch.Size) -> torch.Size:
        return self._seen.setdefault((torch.Size, tuple(value)), torch.Size(value))

    def entry(self, value: Any) -> TensorStorageMetadata:
        chunks = [self._chunk(self.size(chunk.offsets), self.size(chunk.sizes)) for chunk in value.chunks]
        properties = self._seen.setdefault(repr(value.properties), value.properties)
        return TensorStorageMetadata(properties=properties, size=self.size(value.size), chunks=chunks)

    def _chunk(self, offsets: torch.Size, sizes: torch.Size) -> ChunkStorageMetadata:
        return self._seen.setdefault((offsets, sizes), ChunkStorageMetadata(offsets=offsets, sizes=sizes))

    def index(self, value: MetadataIndex) -> MetadataIndex:
        offset = None if value.offset is None else self.size(value.offset)
        return MetadataIndex(self.text(value.fqn), offset, value.index)

    def info(self, value: _StorageInfo) -> _StorageInfo:
        return _StorageInfo(self.text(value.relative_path), value.offset, value.length)
