"""Checkpoints in memory: after a step each rank has its part as the files that a checkpoint on disk would hold, to be
kept somewhere else (another process, another machine) and loaded, verified, into processes that never saw the step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.storage import WriteResult

from rlinf_lite import faults
from rlinf_lite.checkpoint import layout, loading
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import DamagedCheckpoint
from rlinf_lite.checkpoint.formats import data_file
from rlinf_lite.checkpoint.formats.dcp_reader import ReadPlan
from rlinf_lite.checkpoint.formats.dcp_writer import Find, ShardPlan, ShardPlanner, encode_metadata, write_items
from rlinf_lite.checkpoint.formats.tensor_file import EntryEncoder
from rlinf_lite.checkpoint.live import HostBuffer, LiveTensors
from rlinf_lite.checkpoint.loading import LoadReport
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.memory.files import MemoryFile, MemoryWriter, path_of
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.saving import Content, capture
from rlinf_lite.checkpoint.state import State
from rlinf_lite.checkpoint.storage import StoragePath

_METADATA = f"{layout.ACTOR}/.metadata"
_ENTRY_BYTES = 2048
"""At most so much stands around the values of a tensor; if not, the file grows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One rank's part of a checkpoint in memory: files by their path, as arrays of bytes."""

    step: int
    shard: dict[str, np.ndarray]
    """This rank's shard file, as ``{"actor/__1_0.distcp": array}``; empty if it has nothing to write."""
    small: dict[str, np.ndarray]
    """On rank 0 the manifest, ``data.pt`` and ``.metadata``; on other ranks empty."""


_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    name: str
    content: np.ndarray
    record: FileRecord
    results: list[WriteResult] | None
    """Where each tensor lies; None: where rank 0 has been told that it lies."""


class MemoryCheckpoints:
    """Takes the state of all ranks as `Replica`, and loads from it. Every method is collective over all ranks.

    Without a process group it is one rank by itself. Of what it gives away, and of what it is given, it keeps nothing.
    """

    def __init__(self, *, seed: int = 0, timeout_seconds: float = 1800.0) -> None:
        """
        Args:
            seed: from which generators start anew where they cannot be restored (another number of ranks).
            timeout_seconds: how long a rank waits for the others.
        """
        self.seed = seed
        self.ranks = Ranks.of_all(timeout_seconds)
        self._host = HostBuffer()
        self._planner = ShardPlanner(self.ranks)
        self._encoder = EntryEncoder()
        self._told: tuple[ShardPlan, list[WriteResult]] | None = None
        self._heard: dict[int, list[WriteResult]] = {}
        self._metadata = b""

    def take(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Replica:
        """This rank's part of a checkpoint of ``state`` and of the generators. What is live may change afterwards.

        Args:
            step, state, data, info: as for `Checkpointer.save`.

        Raises:
            RankSilent: a rank is gone, or did not come in time.
            TypeError: as `Checkpointer.save`.
        """
        try:
            return self._take(step, state, data or {}, info or {})
        except BaseException:
            self._planner.forget()  # then all ranks plan anew, and tell anew where their tensors lie
            raise

    def _take(self, step: int, state: State, data: Mapping[str, Any], info: Mapping[str, Any]) -> Replica:
        ranks, captured, written = self.ranks, list[Content](), list[_Shard]()

        def write(plan: ShardPlan, find: Find) -> _Shard:
            shard = self._write(step, plan, find)
            written[:] = [shard]
            return replace(shard, content=_NOTHING, results=self._news(plan, shard.results))  # what the others hear

        def at_once() -> _Shard | None:
            captured.append(capture(state, ranks.rank, data, info, None))
            found = self._planner.last(captured[0].tensors)
            return found and write(*found)

        shards = ranks.collect(at_once)
        if not all(shards):
            planned = self._planner.plan(lambda: captured[0].tensors)
            shards = [*ranks.collect(lambda: write(*planned))]
        (mine,) = written
        return Replica(
            step=step,
            shard={mine.name: mine.content} if mine.record.size else {},
            small=self._small_files(step, captured[0], shards) if ranks.rank == 0 else {},
        )

    @torch.no_grad()  # with gradients a sharded tensor gives its local part by way of autograd, which takes long
    def _write(self, step: int, plan: ShardPlan, find: Find) -> _Shard:
        rank, live = self.ranks.rank, LiveTensors(0.0, self._host)
        faults.reach("replica.write", step=step, rank=rank)
        name, file = f"__{rank}_0.distcp", MemoryWriter(sum(plan.num_bytes()) + _ENTRY_BYTES * len(plan.items))
        live.open(plan.num_bytes(), lambda index: find(plan.items[index]))
        try:
            results = write_items(file, name, plan, live, self._encoder)
        finally:
            live.close()
        return _Shard(name=f"{layout.ACTOR}/{name}", content=file.content(), record=file.record(), results=results)

    def _news(self, plan: ShardPlan, results: list[WriteResult] | None) -> list[WriteResult] | None:
        """Where this rank's tensors lie, if rank 0 does not know yet: with many tensors this is much to send."""
        assert results is not None
        known = self._told is not None and self._told[0] is plan and self._told[1] == results
        self._told = plan, results
        return None if known else results

    def _small_files(self, step: int, content: Content, shards: list[_Shard | None]) -> dict[str, np.ndarray]:
        raw = {_METADATA: self._encode_metadata(shards), layout.DATA: content.data}
        records = {shard.name: shard.record for shard in shards if shard and shard.record.size}
        for name, part in raw.items():
            records[name] = FileRecord(size=len(part), sha256=hashlib.sha256(part).hexdigest())
        manifest = Manifest(step=step, world_size=self.ranks.size, files=records, info=content.info)
        raw[layout.MANIFEST] = manifest.to_json().encode()
        return {name: np.frombuffer(part, np.uint8) for name, part in raw.items()}

    def _encode_metadata(self, shards: list[_Shard | None]) -> bytes:
        """The bytes of the last time if nothing has moved since: to make them takes longer than a small shard."""
        news = {rank: shard.results for rank, shard in enumerate(shards) if shard and shard.results is not None}
        if news:
            self._heard |= news
            plan = self._planner.current()
            self._metadata = encode_metadata(plan, [self._heard[rank] for rank in range(self.ranks.size)])
        return self._metadata

    def load(self, step: int, files: Mapping[str, np.ndarray], state: State) -> LoadReport:
        """Fill ``state`` in place from the replica of ``step``, and restore this rank's generators.

        Nothing is believed: every rank checks its small files against the manifest, and the sha256 of each shard that
        it reads from. After an error other than `StateMismatch` ``state`` is undefined.

        Args:
            files: the small files, and shards: with as many ranks as there were, each rank's own, and what little it
                needs of others it is sent by them; with another number all of them, or, slower, those whose number
                modulo the number of ranks is this rank's. They may be read-only.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint, StateMismatch: as `Checkpointer.load`.
            RankSilent: a rank is gone, or did not come in time.
        """
        started, ranks = time.perf_counter(), self.ranks
        held = _whole(files)
        path = path_of(held, step)
        every = ranks.collect(lambda: _open(path, held, ranks))
        manifest = every[0]
        if any(other != manifest for other in every):
            raise DamagedCheckpoint(f"{path}: the ranks were given files of different replicas")
        if manifest.world_size == ranks.size:
            _keep_own(held, ranks)
        hashes = {_in_actor(name): manifest.files[name].sha256 for name in held if _is_shard(name)}
        report = loading.fill(
            ranks,
            path,
            manifest,
            state,
            seed=self.seed,
            whole=True,
            hashes=hashes,
            started=started,
            bring=lambda plan: _exchange(ranks, held, manifest, plan),
        )
        return replace(report, path=Path(str(path)))


def read_small(step: int, small: Mapping[str, np.ndarray]) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and ``data.pt`` of a replica, verified. Not collective, and no shard is needed.

    Raises:
        NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `Checkpointer.load`.
    """
    path = path_of(_whole(small), step)
    manifest = manifests.read(path)
    manifests.verify_file(path, layout.DATA, manifest)
    return manifest, data_file.read_data(path)


def _whole(files: Mapping[str, np.ndarray]) -> dict[str, MemoryFile]:
    return {name: MemoryFile(content.nbytes, {0: content}) for name, content in files.items()}


def _is_shard(name: str) -> bool:
    return loading.reader_of(name, 1) is not None


def _in_actor(name: str) -> str:
    return name.removeprefix(f"{layout.ACTOR}/")


def _open(path: StoragePath, held: Mapping[str, MemoryFile], ranks: Ranks) -> Manifest:
    """The manifest; small files are checked against it whole, shards by their presence and size."""
    manifest = manifests.read(path)
    if foreign := sorted(held.keys() - manifest.files.keys() - {layout.MANIFEST}):
        raise DamagedCheckpoint(f"{path}: {foreign[0]} is not in the manifest")
    for name, record in sorted(manifest.files.items()):
        if name in held:
            if not _is_shard(name):
                manifests.verify_file(path, name, manifest)
            elif held[name].size != record.size:
                raise DamagedCheckpoint(f"{path / name}: {held[name].size} bytes, the manifest says {record.size}")
        elif loading.reader_of(name, ranks.size) in (None, ranks.rank):
            raise DamagedCheckpoint(f"{path}: {name} is missing among the files that rank {ranks.rank} was given")
    return manifest


def _keep_own(held: dict[str, MemoryFile], ranks: Ranks) -> None:
    """Other ranks' shards are not looked at: to hash them here takes longer than to be sent what is needed of them."""
    for name in [name for name in held if _is_shard(name) and loading.reader_of(name, ranks.size) != ranks.rank]:
        del held[name]


def _exchange(ranks: Ranks, held: dict[str, MemoryFile], manifest: Manifest, plan: ReadPlan) -> None:
    """Bring the parts of shards that a rank needs and does not hold (tensors that all ranks share are in one shard).

    They come from the rank that holds the shard, and hashes it whole in this very load: if it is damaged, all hear it.
    """
    names = {name: f"{layout.ACTOR}/{name}" for name in plan.by_file}
    missing = {names[name]: sorted(spans) for name, spans in plan.by_file.items() if names[name] not in held}
    asked = ranks.gather(missing)
    if not any(asked):
        return
    wanted = {(name, span) for part in asked for name, spans in part.items() for span in spans}
    mine = {(name, span) for name, span in wanted if loading.reader_of(name, ranks.size) == ranks.rank}
    sent = ranks.collect(lambda: {(name, span): held[name].part(*span) for name, span in sorted(mine)})
    came = {key: content for part in sent for key, content in part.items()}
    for name, spans in missing.items():
        parts = {span[0]: came[name, span] for span in spans if (name, span) in came}
        if parts:  # a file that nobody has is reported by who reads it
            held[name] = MemoryFile(manifest.files[name].size, parts)
