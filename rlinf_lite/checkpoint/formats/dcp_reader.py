"""Reads the shards of a DCP directory: only the bytes that are needed, hashed on the way where asked for.

Reads tensors only, each through an allow-list; nothing is unpickled without restriction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.read_ahead import PIECE_BYTES, Span, read_ahead, read_span
from rlinf_lite.checkpoint.formats.tensor_file import EntryDecoder, Form
from rlinf_lite.checkpoint.formats.unpickling import UNREADABLE, reading_error
from rlinf_lite.checkpoint.hashing import hasher
from rlinf_lite.checkpoint.manifest import FileRecord
from rlinf_lite.checkpoint.storage import StoragePath, is_local, size_of

Fill = Callable[[memoryview], None]
"""Takes the bytes of a span to where they belong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """Which parts of which files belong to which tensors."""

    planner: DefaultLoadPlanner
    by_file: dict[str, dict[Span, list[ReadItem]]]


class ShardReader:
    """Fills tensors from the DCP directory ``directory``, whose ``.metadata`` it reads when it is created."""

    def __init__(self, directory: StoragePath, metadata: Metadata | None = None) -> None:
        """
        Args:
            metadata: None reads ``.metadata``.

        Raises:
            UnsafeCheckpoint, DamagedCheckpoint: as `read_metadata`.
        """
        self.path = directory
        self.metadata: Metadata = read_metadata(directory) if metadata is None else metadata
        self._decoder = EntryDecoder()

    def read(self, tensors: Mapping[str, Any], records: Mapping[str, FileRecord] | None = None) -> int:
        """Fill nested dicts of tensors (plain, or this process's shards of distributed ones) in place.

        Args:
            records: what is expected, by file name: those files are read and hashed whole, others in part.

        Returns:
            Bytes read.

        Raises:
            UnsafeCheckpoint: an entry holds something other than a tensor.
            DamagedCheckpoint: a file does not have its hash, or cannot be read, or ends early.
            CheckpointError: torch cannot plan the load.
        """
        return self.fill(self.plan(tensors), records)

    def plan(self, tensors: Mapping[str, Any]) -> ReadPlan:
        """Plan what `fill` has to read for ``tensors``, without reading a shard. Raises as `read`."""
        planner = DefaultLoadPlanner()
        try:
            planner.set_up_planner(dict(tensors), self.metadata, is_coordinator=True)
            (plan,) = planner.create_global_plan([planner.create_local_plan()])
            planner.finish_plan(plan)
        except (RuntimeError, ValueError, AssertionError, KeyError) as error:
            raise CheckpointError(f"{self.path}: cannot be loaded: {error}") from None
        return ReadPlan(planner=planner, by_file=self._by_file(plan.items))

    @torch.no_grad()  # with gradients a sharded tensor returns its local part through autograd, which is slow
    def fill(self, plan: ReadPlan, records: Mapping[str, FileRecord] | None = None) -> int:
        """Read what was planned. Arguments and result as `read`."""
        wanted, expected = plan.by_file, dict(records or {})
        # The file that this rank needs most first: meanwhile other ranks bring the rest to the page cache.
        names = sorted({*wanted, *expected}, key=lambda name: -sum(length for _, length in wanted.get(name, ())))
        return sum(self._read_file(name, wanted.get(name, {}), plan.planner, expected.get(name)) for name in names)

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
        self, name: str, wanted: dict[Span, list[ReadItem]], planner: DefaultLoadPlanner, record: FileRecord | None
    ) -> int:
        file, num_bytes = self.path / name, 0
        digest = None if record is None else hasher(record.algorithm)
        try:
            size = size_of(file)
            if (end := max((sum(span) for span in wanted), default=0)) > size:
                raise EOFError(f"ends before byte {end}")
            fills: dict[Span, Fill] = {}
            for span, items in wanted.items():
                fills |= self._fills(file, span, items, planner)
            spans = sorted(fills) if digest is None else _cover(sorted(fills), size)
            with closing(read_ahead(file, spans)) as pieces:
                for span, piece in pieces:
                    num_bytes += len(piece)
                    if digest is not None:
                        digest.update(piece)
                    if span in fills:
                        fills[span](piece)
        except UNREADABLE as error:
            raise reading_error(str(file), error) from None
        if record is not None and digest is not None and digest.hexdigest() != record.digest:
            raise DamagedCheckpoint(f"{file}: its {record.algorithm} is not the one in the manifest")
        return num_bytes

    def _fills(
        self, file: StoragePath, span: Span, items: list[ReadItem], planner: DefaultLoadPlanner
    ) -> dict[Span, Fill]:
        """What to do with the bytes of a stored tensor: a large one is read in blocks, and never in memory whole."""
        offset, num_bytes = span
        if num_bytes > PIECE_BYTES and is_local(file):  # elsewhere each further access may take long
            form = self._decoder.form(num_bytes, lambda at, view: read_span(file, offset + at, view))
            if form is not None and (num_rows := PIECE_BYTES // form.row_bytes):
                return self._blocks(span, form, num_rows, items, planner)
        return {span: lambda piece: self._fill(piece, items, planner)}

    def _blocks(
        self, span: Span, form: Form, num_rows: int, items: list[ReadItem], planner: DefaultLoadPlanner
    ) -> dict[Span, Fill]:
        """Fills from blocks of ``num_rows`` rows, and what comes before and after them."""
        self._check_form(form.dtype, form.shape, items)
        start, end = span[0] + len(form.head), span[0] + form.end

        def check_head(piece: memoryview) -> None:
            if not form.fits(piece):
                raise ValueError("an entry changed while it was read")

        def fill(piece: memoryview, first: int) -> None:
            rows = torch.frombuffer(piece, dtype=form.dtype).view(-1, *form.shape[1:])
            for item in items:
                _copy_rows(rows, first, item, planner)

        fills: dict[Span, Fill] = {(span[0], len(form.head)): check_head}
        for first in range(0, form.shape[0], num_rows):
            at = start + first * form.row_bytes
            fills[at, min(num_rows * form.row_bytes, end - at)] = partial(fill, first=first)
        return fills

    def _fill(self, piece: memoryview, items: list[ReadItem], planner: DefaultLoadPlanner) -> None:
        """Copy a stored tensor, or parts of it, to where ``items`` want it."""
        stored = self._decoder.decode(piece)
        if not isinstance(stored, torch.Tensor):
            raise UnsafeCheckpoint(f"holds a {type(stored).__name__} where a tensor was asked for")
        self._check_form(stored.dtype, stored.shape, items)
        for item in items:
            _copy_rows(stored, 0, item, planner)

    def _check_form(self, dtype: torch.dtype, shape: torch.Size, items: list[ReadItem]) -> None:
        for item in items:
            if (shape, dtype) != self._chunk(item):
                raise ValueError(f"{item.storage_index.fqn} is stored as {dtype} {list(shape)}")

    def _chunk(self, item: ReadItem) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of a stored tensor according to ``.metadata``."""
        entry = cast(TensorStorageMetadata, self.metadata.state_dict_metadata[item.storage_index.fqn])
        return entry.chunks[cast(int, item.storage_index.index)].sizes, entry.properties.dtype


def _copy_rows(rows: torch.Tensor, first: int, item: ReadItem, planner: DefaultLoadPlanner) -> None:
    """Copy what ``item`` wants of a stored tensor's rows; ``first`` is the index of the first of them."""
    target = planner.resolve_tensor(item).detach()
    if rows.dim():
        start, stop = item.storage_offsets[0], item.storage_offsets[0] + item.lengths[0]
        low, high = max(start, first), min(stop, first + len(rows))
        if low >= high:
            return
        rows, target = rows[low - first : high - first], target[low - start : high - start]
    for dim in range(1, rows.dim()):
        rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    target.copy_(rows)


def _num_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _cover(wanted: list[Span], size: int) -> list[Span]:
    """Spans that cover the whole file in order: the wanted ones as they are, the bytes between them in pieces."""
    spans, at = [], 0
    for offset, length in [*wanted, (size, 0)]:
        if offset < at:
            raise ValueError("two of its entries overlap")
        spans += [(start, min(PIECE_BYTES, offset - start)) for start in range(at, offset, PIECE_BYTES)]
        if length:
            spans.append((offset, length))
        at = offset + length
    return spans


def check_size(directory: StoragePath, entries: Mapping[str, TensorStorageMetadata]) -> None:
    """Refuse tensors that are larger than the files that should hold them, before memory is allocated for them.

    Raises:
        DamagedCheckpoint: names the directory and both sizes.
    """
    asked = sum(_num_bytes(entry.size, entry.properties.dtype) for entry in entries.values())
    there = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    if asked > there:
        raise DamagedCheckpoint(f"{directory}: names tensors of {asked} bytes, but its files hold {there}")
