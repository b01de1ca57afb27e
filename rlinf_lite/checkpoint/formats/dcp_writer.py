"""Writes a sharded state as a DCP directory: which rank writes what, each rank's file, and ``.metadata``.

The plan is torch's own (`DefaultSavePlanner`), and any DCP reader can load the result. The bytes are written here, in
order and hashed, from live tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint.formats.tensor_file import EntryEncoder
from rlinf_lite.checkpoint.live import TensorReader
from rlinf_lite.checkpoint.parts import Create, FilesPart, SectionPart, Written
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.sections import Section
from rlinf_lite.checkpoint.state import flat_names

Resolve = Callable[[str, torch.Tensor], torch.Tensor]
Taken = Mapping[str, Any] | FilesPart
"""Nested dicts of tensors, or the files of a state that has its own layout."""
Signature = tuple[tuple[Any, ...], ...]
_WHOLE = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors that are not sharded."""
_ENTRY_BYTES = 2048
"""Room for the bytes around the values of each tensor. If they need more, a file in memory grows."""


class ShardPlan:
    """What this rank writes, and the metadata of its whole section."""

    def __init__(self, items: list[WriteItem], metadata: Metadata, signature: Signature) -> None:
        self.items, self.metadata, self.signature = items, metadata, signature
        self.num_bytes = [_num_bytes(item) for item in items]
        """The size in memory of each item."""
        self._placed: tuple[str, list[int]] | None = None
        self._results: list[WriteResult] = []

    def results(self, name: str, lengths: list[int]) -> list[WriteResult]:
        """Where each item is in the file ``name``: the same list as before if the lengths, in bytes, are the same."""
        if self._placed != (name, lengths):
            self._placed = name, lengths
            self._results = [
                WriteResult(
                    index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, end - length, length)
                )
                for item, length, end in zip(self.items, lengths, accumulate(lengths), strict=True)
            ]
        return self._results


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
    tensors: Mapping[str, torch.Tensor]
    """By their names in a checkpoint."""
    resolve: Resolve | None

    def num_bytes(self) -> list[int]:
        return self.plan.num_bytes

    def tensor(self, index: int) -> torch.Tensor:
        place = self.plan.items[index].index
        tensor = self.tensors[place.fqn]
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        elif type(tensor) not in _WHOLE:
            tensor = find_state_dict_object(cast(dict[str, Any], self.tensors), place)
        return self.resolve(place.fqn, tensor) if self.resolve and tensor.is_meta else tensor

    def write(self, create: Create, live: TensorReader, halfway: Callable[[], None] = lambda: None) -> Written:
        items = self.plan.items
        if not items:
            return Written(files={})
        lengths = []
        with create(self.name, sum(self.plan.num_bytes) + _ENTRY_BYTES * len(items)) as file:
            for index in range(len(items)):
                if index == len(items) // 2:
                    halfway()
                with live.reading(index) as tensor:
                    lengths.append(self.encoder.write(tensor, file))
        return Written(files={self.name: file.record()}, results=self.plan.results(self.name, lengths))

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
        flat: dict[str, torch.Tensor] = {}
        planner = DefaultSavePlanner()

        def is_planned() -> bool:
            taken.append(take())
            if not isinstance(taken[0], FilesPart):
                flat.update(_flat(taken[0]))
            return isinstance(taken[0], FilesPart) or self._fits(flat)

        def local_plan() -> SavePlan | None:
            if isinstance(taken[0], FilesPart):
                return None
            planner.set_up_planner(dict(taken[0]), is_coordinator=section.is_first)
            return planner.create_local_plan()

        if not all(ranks.collect(is_planned)):
            plans = ranks.collect(local_plan)
            if not isinstance(taken[0], FilesPart):
                of_section = [cast(SavePlan, plans[rank]) for rank in section.ranks]
                global_plan, metadata = planner.create_global_plan(of_section)
                items = global_plan[section.place].items
                self._last = ShardPlan(items, metadata, _signature(flat))
        return taken[0] if isinstance(taken[0], FilesPart) else self._part(flat, resolve)

    def last(self, taken: Taken) -> SectionPart | None:
        """As `plan`, if the last plan fits the state of this rank, else None. Not collective: ranks may differ."""
        if isinstance(taken, FilesPart):
            return taken
        flat = _flat(taken)
        return self._part(flat, None) if self._fits(flat) else None

    def _fits(self, flat: Mapping[str, torch.Tensor]) -> bool:
        return self._last is not None and self._last.signature == _signature(flat)

    def _part(self, flat: Mapping[str, torch.Tensor], resolve: Resolve | None) -> ShardPart:
        assert self._last is not None
        return ShardPart(
            plan=self._last, name=self._section.shard, encoder=self._encoder, tensors=flat, resolve=resolve
        )

    def forget(self) -> None:
        """Plan anew next time, because after a failure ranks may remember different plans."""
        self._last = None


def _flat(taken: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by their names in a checkpoint."""
    flat = flat_names(taken)
    if all(isinstance(tensor, DTensor) or type(tensor) in _WHOLE for tensor in flat.values()):
        return flat
    planner = DefaultSavePlanner()  # it knows what becomes of other kinds, such as the ShardedTensor of FSDP1
    planner.set_up_planner(dict(taken))
    return planner.state_dict


def _signature(flat: Mapping[str, torch.Tensor]) -> Signature:
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
        if (type(value), value) not in self._seen:
            # A copy, as of a name from another rank: "torch" may be the object that names that module in the pickle.
            self._seen[type(value), value] = pickle.loads(pickle.dumps(value))
        return self._seen[type(value), value]

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
