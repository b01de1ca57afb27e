"""Reading the shards of a DCP directory: only the bytes asked for, hashed on the way where that is wanted.

Tensors and nothing else, each through an allow-list; no entry is unpickled freely.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.read_ahead import PIECE_BYTES, Span, read_ahead
from rlinf_lite.checkpoint.formats.tensor_file import EntryDecoder
from rlinf_lite.checkpoint.formats.unpickling import UNREADABLE, reading_error
from rlinf_lite.checkpoint.storage import StoragePath, size_of

_OVERHEAD_BYTES = 1 << 20
"""At most so much does an entry hold beside its tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """Which parts of which files of a directory belong into which tensors."""

    planner: DefaultLoadPlanner
    by_file: dict[str, dict[Span, list[ReadItem]]]


class ShardReader:
    """Fills tensors from the DCP directory ``actor_dir``, whose ``.metadata`` is read when the reader is made."""

    def __init__(self, actor_dir: StoragePath) -> None:
        """
        Raises:
            UnsafeCheckpoint, DamagedCheckpoint: as `read_metadata`.
        """
        self.path = actor_dir
        self.metadata: Metadata = read_metadata(actor_dir)
        self._decoder = EntryDecoder()

    def read(self, tensors: Mapping[str, Any], sha256: Mapping[str, str] | None = None) -> int:
        """Fill nested dicts of tensors (plain, or this process's shards of distributed ones) in place.

        Args:
            sha256: by file name: files that are read whole, and must have this hash. Others are read in part.

        Returns:
            Bytes read.

        Raises:
            UnsafeCheckpoint: an entry asks for something else than a tensor.
            DamagedCheckpoint: a file does not have its hash, or cannot be read, or ends early.
            CheckpointError: anything else that stands against it.
        """
        return self.fill(self.plan(tensors), sha256)

    def plan(self, tensors: Mapping[str, Any]) -> ReadPlan:
        """What `fill` has to read for ``tensors``. Raises as `read`; no shard is touched."""
        planner = DefaultLoadPlanner()
        try:
            planner.set_up_planner(dict(tensors), self.metadata, is_coordinator=True)
            (plan,) = planner.create_global_plan([planner.create_local_plan()])
            planner.finish_plan(plan)
        except (RuntimeError, ValueError, AssertionError, KeyError) as error:
            raise CheckpointError(f"{self.path}: cannot be loaded: {error}") from None
        return ReadPlan(planner=planner, by_file=self._by_file(plan.items))

    def fill(self, plan: ReadPlan, sha256: Mapping[str, str] | None = None) -> int:
        """The second half of `read`."""
        wanted, hashes = plan.by_file, dict(sha256 or {})
        # First what this rank needs most of: by then others have brought the rest to the page cache.
        names = sorted({*wanted, *hashes}, key=lambda name: -sum(length for _, length in wanted.get(name, ())))
        return sum(self._read_file(name, wanted.get(name, {}), plan.planner, hashes.get(name)) for name in names)

    def _by_file(self, items: list[ReadItem]) -> dict[str, dict[Span, list[ReadItem]]]:
        by_file: dict[str, dict[Span, list[ReadItem]]] = {}
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                name = item.dest_index.fqn
                raise UnsafeCheckpoint(f"{self.path}: {name} is a pickled object where a tensor was asked for")
            info = self.metadata.storage_data.get(item.storage_index)
            if info is None:
                raise DamagedCheckpoint(f"{self.path}: .metadata does not say where {item.storage_index.fqn} is")
            by_file.setdefault(info.relative_path, {}).setdefault((info.offset, info.length), []).append(item)
        return by_file

    def _read_file(
        self, name: str, wanted: dict[Span, list[ReadItem]], planner: DefaultLoadPlanner, sha256: str | None
    ) -> int:
        file, digest, num_bytes = self.path / name, hashlib.sha256(), 0
        try:
            size = size_of(file)
            self._check_spans(wanted, size)
            spans = sorted(wanted) if sha256 is None else _cover(sorted(wanted), size)
            with closing(read_ahead(file, spans)) as pieces:
                for span, piece in pieces:
                    num_bytes += len(piece)
                    if sha256 is not None:
                        digest.update(piece)
                    if span in wanted:
                        self._fill(piece, wanted[span], planner)
        except UNREADABLE as error:
            raise reading_error(str(file), error) from None
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DamagedCheckpoint(f"{file}: its sha256 is not the one in the manifest")
        return num_bytes

    def _check_spans(self, wanted: Mapping[Span, list[ReadItem]], size: int) -> None:
        """Before memory is taken for them."""
        for (offset, length), items in wanted.items():
            most = min(_num_bytes(*self._chunk(item)) for item in items) + _OVERHEAD_BYTES
            if not 0 < length <= most:
                raise ValueError(f"an entry of {length} bytes where 1 to {most} were expected")
            if offset + length > size:
                raise EOFError(f"ends before byte {offset + length}")

    def _fill(self, piece: memoryview, items: list[ReadItem], planner: DefaultLoadPlanner) -> None:
        """Copy one stored tensor to where it, or a part of it, is wanted."""
        stored = self._decoder.decode(piece)
        if not isinstance(stored, torch.Tensor):
            raise UnsafeCheckpoint(f"holds a {type(stored).__name__} where a tensor was asked for")
        for item in items:
            if (stored.shape, stored.dtype) != self._chunk(item):
                raise ValueError(f"{item.storage_index.fqn} is stored as {stored.dtype} {list(stored.shape)}")
            part = stored
            if item.lengths != stored.shape:
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
            planner.resolve_tensor(item).detach().copy_(part)

    def _chunk(self, item: ReadItem) -> tuple[torch.Size, torch.dtype]:
        """Shape and type that ``.metadata`` says a stored tensor has."""
        entry = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[item.storage_index.fqn])
        return entry.chunks[cast(int, item.storage_index.index)].sizes, entry.properties.dtype


def _num_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _cover(wanted: list[Span], size: int) -> list[Span]:
    """The whole file in order: the wanted spans as they are, what lies between them in pieces."""
    spans, at = [], 0
    for offset, length in [*wanted, (size, 0)]:
        if at > size:
            raise EOFError(f"ends before byte {at}")
        if offset < at:
            raise ValueError("two of its entries lie over each other")
        spans += [(start, min(PIECE_BYTES, offset - start)) for start in range(at, offset, PIECE_BYTES)]
        spans += [(offset, length)] * bool(length)
        at = offset + length
    return spans


def check_size(actor_dir: StoragePath, entries: Mapping[str, TensorStorageMetadata]) -> None:
    """Refuse tensors larger than the files that should hold them, before memory is taken for them.

    Raises:
        DamagedCheckpoint: names the directory and both sizes.
    """
    asked = sum(_num_bytes(entry.size, entry.properties.dtype) for entry in entries.values())
    there = sum(file.stat().st_size for file in actor_dir.iterdir() if file.is_file())
    if asked > there:
        raise DamagedCheckpoint(f"{actor_dir}: names tensors of {asked} bytes, but its files hold {there}")
