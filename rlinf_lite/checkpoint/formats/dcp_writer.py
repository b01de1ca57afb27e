"""Writes a sharded state as a DCP directory: which rank writes what, each rank's file, and ``.metadata``.

The plan is torch's own (`DefaultSavePlanner`), and any DCP reader can load the result. The bytes are written here, in
order and hashed, from live tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint.formats.tensor_file import EntryEncoder
from rlinf_lite.checkpoint.live import TensorReader
from rlinf_lite.checkpoint.parts import Create, FilesPart, SectionPart, Written
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.sections import Section

Find = Callable[[WriteItem], torch.Tensor]
Resolve = Callable[[str, torch.Tensor], torch.Tensor]
Taken = Mapping[str, Any] | FilesPart
"""Nested dicts of tensors, or the files of a state that has its own layout."""
Signature = tuple[tuple[Any, ...], ...]
_ENTRY_BYTES = 2048
"""Room for the bytes around the values of each tensor. If they need more, a file in memory grows."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPart:
    """A `SectionPart`: one rank's shard, and the section's ``.metadata``."""

    plan: ShardPlan
    name: str
    """Of the shard's file."""
    encoder: EntryEncoder
    find: Find
    resolve: Resolve | None

    def num_bytes(self) -> list[int]:
        return self.plan.num_bytes()

    def tensor(self, index: int) -> torch.Tensor:
        item = self.plan.items[index]
        tensor = self.find(item)
        return self.resolve(item.index.fqn, tensor) if self.resolve and tensor.is_meta else tensor

    def write(self, create: Create, live: TensorReader, halfway: Callable[[], None] = lambda: None) -> Written:
        items, results = self.plan.items, []
        if not items:
            return Written(files={})
        with create(self.name, sum(self.num_bytes()) + _ENTRY_BYTES * len(items)) as file:
            for index, item in enumerate(items):
                if index == len(items) // 2:
                    halfway()
                offset = file.tell()
                with live.reading(index) as tensor:
                    self.encoder.write(tensor, file)
                info = _StorageInfo(self.name, offset, file.tell() - offset)
                results.append(WriteResult(index=item.index, size_in_bytes=info.length, storage_data=info))
        return Written(files={self.name: file.record()}, results=results)

    def metadata(self, results: Sequence[list[WriteResult]]) -> bytes:
        return encode_metadata(self.plan, results)


class ShardPlanner:
    """Plans with the other ranks of its section who writes what; all ranks take part.

    The plan is reused for states with the same names and shapes. Files of the state's own layout need none.
    """

    def __init__(self, ranks: Ranks, section: Section) -> None:
        self._ranks, self._section = ranks, section
        self._last: ShardPlan | None = None
        self._encoder = EntryEncoder()

    def plan(self, take: Callable[[], Taken], resolve: Resolve | None = None) -> SectionPart:
        """Plan the save of nested dicts of tensors. Collective.

        Args:
            take: returns the state of this rank. If it fails on one rank, all ranks raise its error.
            resolve: as for `Checkpointer.save`.
        """
        ranks, section = self._ranks, self._section
        taken: list[Taken] = []
        planner = DefaultSavePlanner()

        def is_planned() -> bool:
            taken.append(take())
            return isinstance(taken[0], FilesPart) or self._is_as_last(planner, taken[0])

        if not all(ranks.collect(is_planned)):
            plans = ranks.collect(lambda: None if isinstance(taken[0], FilesPart) else planner.create_local_plan())
            if not isinstance(taken[0], FilesPart):
                of_section = [cast(SavePlan, plans[rank]) for rank in section.ranks]
                global_plan, metadata = planner.create_global_plan(of_section)
                signature = _signature(planner.state_dict)
                self._last = ShardPlan(items=global_plan[section.place].items, metadata=metadata, signature=signature)
        return taken[0] if isinstance(taken[0], FilesPart) else self._part(planner, resolve)

    def last(self, taken: Taken) -> SectionPart | None:
        """As `plan`, if the last plan fits the state of this rank, else None. Not collective: ranks may differ."""
        if isinstance(taken, FilesPart):
            return taken
        planner = DefaultSavePlanner()
        return self._part(planner, None) if self._is_as_last(planner, taken) else None

    def _is_as_last(self, planner: DefaultSavePlanner, tensors: Mapping[str, Any]) -> bool:
        planner.set_up_planner(dict(tensors), is_coordinator=self._section.is_first)
        return self._last is not None and self._last.signature == _signature(planner.state_dict)

    def _part(self, planner: DefaultSavePlanner, resolve: Resolve | None) -> ShardPart:
        assert self._last is not None
        return ShardPart(
            plan=self._last,
            name=self._section.shard,
            encoder=self._encoder,
            find=cast(Find, planner.resolve_data),
            resolve=resolve,
        )

    def forget(self) -> None:
        """Plan anew next time, because after a failure ranks may remember different plans."""
        self._last = None


def _signature(flat: Mapping[str, Any]) -> Signature:
    return tuple(
        (name, tensor.dtype, tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None)
        for name, tensor in flat.items()
    )


def encode_metadata(plan: ShardPlan, results: Sequence[list[WriteResult]]) -> bytes:
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
