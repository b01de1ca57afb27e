"""Replicas: each rank's part of a checkpoint as files in memory, to be held by another process or machine.

A replica is loaded and verified like a checkpoint on disk, also by processes that did not run the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from rlinf_lite.checkpoint.file_state import FileState
from rlinf_lite.checkpoint.formats import data_file
from rlinf_lite.checkpoint.formats.dcp_reader import ReadPlan
from rlinf_lite.checkpoint.formats.dcp_writer import ShardPlanner
from rlinf_lite.checkpoint.hashing import hash_of
from rlinf_lite.checkpoint.live import HostBuffer, StillTensors
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.memory.files import MemoryFile, MemoryWriter, path_of
from rlinf_lite.checkpoint.parts import SectionPart, Written
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.reports import LoadReport
from rlinf_lite.checkpoint.saving import Content, capture, joined
from rlinf_lite.checkpoint.sections import Section, check_sections, files_of, section_of_file
from rlinf_lite.checkpoint.state import State
from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """One rank's part of a checkpoint in memory: files by their path, as arrays of bytes."""

    step: int
    shard: dict[str, np.ndarray]
    """This rank's files, as ``{"actor/__1_0.distcp": array}``; empty if the rank has nothing to write."""
    small: dict[str, np.ndarray]
    """The manifest, ``data.pt`` and ``.metadata`` of all sections on rank 0; empty on other ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    """What the other ranks are told of one rank's files."""

    records: dict[str, FileRecord]
    """By path in the checkpoint."""
    results: list[WriteResult] | None
    """Where each tensor is in the file; None if nothing changed since these were last sent to the other ranks."""


class MemoryCheckpoints:
    """Takes the state of all ranks as `Replica`, and loads from replicas. Every method is collective over all ranks.

    It works without a process group, for a single rank. It keeps no reference to the files that it returns or is given.
    """

    def __init__(self, *, seed: int = 0, timeout_seconds: float = 1800.0, section: str = layout.ACTOR) -> None:
        """
        Args:
            seed: a new RNG state is derived from it where the saved one does not fit (another number of ranks).
            timeout_seconds: how long a rank waits for the others.
            section: as for `Checkpointer`.

        Raises:
            ValueError: as `Checkpointer`.
        """
        self.seed = seed
        self.ranks = Ranks.of_all(timeout_seconds, near=True)
        self.section = Section.agree(self.ranks, section)
        self._host = HostBuffer()
        self._planner = ShardPlanner(self.ranks, self.section)
        self._sent: tuple[object, list[WriteResult]] | None = None  # by this rank
        self._received: dict[int, list[WriteResult]] = {}  # by rank
        self._metadata: list[bytes | None] = []  # by rank: of the section whose first rank it is

    def take(
        self,
        step: int,
        state: State | FileState,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Replica:
        """Copy this rank's part of a checkpoint of ``state`` and the RNG state. The state may change after the call.

        Args:
            step, state, data, info: as for `Checkpointer.save`.

        Raises:
            RankSilent: a rank is gone, or did not answer in time.
            TypeError: as `Checkpointer.save`.
        """
        try:
            return self._take(step, state, data or {}, info or {})
        except BaseException:
            self._planner.forget()  # all ranks plan anew, and send their results anew
            raise

    def _take(self, step: int, state: State | FileState, data: Mapping[str, Any], info: Mapping[str, Any]) -> Replica:
        ranks = self.ranks
        content: Content | None = None
        part: SectionPart | None = None
        mine: dict[str, np.ndarray] = {}

        def write(planned: SectionPart) -> _Sent:
            nonlocal part, mine
            part = planned
            mine, written = self._write(step, planned)
            records = {f"{self.section.name}/{name}": record for name, record in written.files.items()}
            return _Sent(records=records, results=self._unsent(planned, written.results))

        def capture_and_write() -> _Sent | None:
            nonlocal content
            content = capture(state, step, ranks.rank, data, info)
            last = self._planner.last(content.taken)
            return None if last is None else write(last)

        sent = ranks.collect(capture_and_write)
        assert content is not None
        if None in sent:
            self._sent = None  # what this rank has just sent was not taken in
            taken = content.taken
            planned = self._planner.plan(lambda: taken)
            sent = [*ranks.collect(lambda: write(planned))]
        assert part is not None
        self._update_metadata(part, sent)
        return Replica(step=step, shard=mine, small=self._small_files(step, content, sent) if ranks.rank == 0 else {})

    @torch.no_grad()  # with gradients a sharded tensor returns its local part through autograd, which is slow
    def _write(self, step: int, part: SectionPart) -> tuple[dict[str, np.ndarray], Written]:
        section = self.section
        faults.reach("replica.write", step=step, rank=section.rank)
        files: dict[str, np.ndarray] = {}

        @contextmanager
        def create(name: str, num_bytes: int) -> Iterator[MemoryWriter]:
            file = MemoryWriter(num_bytes)
            yield file
            files[f"{section.name}/{name}"] = file.content()

        return files, part.write(create, StillTensors(part.tensor, self._host))

    def _unsent(self, part: SectionPart, results: list[WriteResult]) -> list[WriteResult] | None:
        """``results``, or None if the other ranks have them already: with many tensors they are slow to send."""
        is_sent = self._sent is not None and self._sent[0] is part.plan and self._sent[1] == results
        self._sent = part.plan, results
        return None if is_sent else results

    def _small_files(self, step: int, content: Content, sent: list[_Sent | None]) -> dict[str, np.ndarray]:
        encoded = {
            f"{name}/{layout.METADATA}": self._metadata[ranks[0]] for name, ranks in self.section.ranks_of.items()
        }
        raw = {layout.DATA: content.data} | {name: part for name, part in encoded.items() if part is not None}
        records = joined([one.records for one in sent if one is not None])
        for name, part in raw.items():
            records[name] = FileRecord(size=len(part), digest=hash_of(part))
        manifest = self.section.manifest(step, records, content.info)
        raw[layout.MANIFEST] = manifest.to_json().encode()
        return {name: np.frombuffer(part, np.uint8) for name, part in raw.items()}

    def _update_metadata(self, part: SectionPart, sent: list[_Sent | None]) -> None:
        """Encode ``.metadata`` if anything changed since the last time: encoding takes longer than a small shard."""
        changed = {rank: one.results for rank, one in enumerate(sent) if one and one.results is not None}
        if not changed:
            return
        self._received |= changed

        def encode() -> bytes | None:
            return part.metadata([self._received[r] for r in self.section.ranks]) if self.section.is_first else None

        self._metadata = self.ranks.collect(encode)

    def load(self, step: int, files: Mapping[str, np.ndarray], state: State | FileState) -> LoadReport:
        """Fill ``state`` in place from the replica of ``step``, and restore this rank's RNG state.

        Every rank verifies its small files against the manifest, and the hash of each shard that it reads. After an
        error other than `StateMismatch` the content of ``state`` is undefined.

        Args:
            files: the small files and shards, which may be read-only. If its section has as many ranks as before, a
                rank needs its own shard; ranks exchange the parts that they need of others. With another number it
                needs all shards of its section, or (slower) those whose number modulo the number of ranks is its place
                among them. For a `FileState` it needs all files of its section. Shards of other sections are ignored.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint, SectionMismatch, StateMismatch: as `Checkpointer.load`.
            RankSilent: a rank is gone, or did not answer in time.
        """
        started, ranks, section = time.perf_counter(), self.ranks, self.section
        held = _whole(files)
        path = path_of(held, step)
        every = ranks.collect(lambda: _open(path, held, section))
        manifest = every[0]
        if any(other != manifest for other in every):
            raise DamagedCheckpoint(f"{path}: the ranks were given files of different replicas")
        check_sections(path, manifest, section.ranks_of, whole=True)
        _keep(held, manifest, section)
        whole_files = {name.removeprefix(f"{section.name}/"): manifest.files[name] for name in held if _is_large(name)}
        source = loading.Source(path=path, manifest=manifest, section=section, whole=True, whole_files=whole_files)
        report = loading.fill(
            ranks,
            source,
            state,
            seed=self.seed,
            started=started,
            before_read=lambda plan: _exchange(ranks, section, held, manifest, plan),
        )
        return replace(report, path=Path(str(path)))


def read_small(step: int, small: Mapping[str, np.ndarray]) -> tuple[Manifest, dict[str, Any]]:
    """Read and verify the manifest and ``data.pt`` of a replica. Not collective, and needs no shard.

    Raises:
        NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `Checkpointer.load`.
    """
    path = path_of(_whole(small), step)
    manifest = manifests.read(path)
    manifests.verify_file(path, layout.DATA, manifest)
    return manifest, data_file.read_data(path)


def _whole(files: Mapping[str, np.ndarray]) -> dict[str, MemoryFile]:
    return {name: MemoryFile(content.nbytes, {0: content}) for name, content in files.items()}


def _is_large(name: str) -> bool:
    return section_of_file(name) is not None


def _open(path: StoragePath, held: Mapping[str, MemoryFile], section: Section) -> Manifest:
    """Read the manifest, and verify against it the small files in full, others by presence and size."""
    manifest = manifests.read(path)
    if foreign := sorted(held.keys() - manifest.files.keys() - {layout.MANIFEST}):
        raise DamagedCheckpoint(f"{path}: {foreign[0]} is not in the manifest")
    needed = _needed(manifest, section)
    for name, record in sorted(manifest.files.items()):
        if name in held:
            if not _is_large(name):
                manifests.verify_file(path, name, manifest)
            elif held[name].size != record.size:
                raise DamagedCheckpoint(f"{path / name}: {held[name].size} bytes, the manifest says {record.size}")
        elif not _is_large(name) or name in needed:
            raise DamagedCheckpoint(f"{path}: {name} is missing from the files that rank {section.rank} was given")
    return manifest


def _needed(manifest: Manifest, section: Section) -> set[str]:
    """The shards that only this rank reads whole; of a section in a layout of its own, all files."""
    own = section.reads(manifest) if manifest.has_shards(section.name) else files_of(section.name, manifest)
    return {f"{section.name}/{name}" for name in own}


def _keep(held: dict[str, MemoryFile], manifest: Manifest, section: Section) -> None:
    """Drop shards of other sections. If as many ranks wrote this section, drop other ranks' shards too: receiving the
    few parts needed of them is faster than hashing them here.
    """
    only_own = len(manifest.ranks_of()[section.name]) == len(section.ranks)
    needed = _needed(manifest, section)
    for name in [name for name in held if _is_large(name) and name not in needed]:
        if only_own or section_of_file(name) != section.name:
            del held[name]


def _exchange(
    ranks: Ranks, section: Section, held: dict[str, MemoryFile], manifest: Manifest, plan: ReadPlan | None
) -> None:
    """Exchange the parts of shards that a rank needs but does not hold (replicated tensors are in one shard only).

    They come from the rank that holds the shard. That rank verifies the whole shard in this load, and if it is damaged,
    all ranks raise.
    """
    by_file = {} if plan is None else {f"{section.name}/{name}": spans for name, spans in plan.by_file.items()}
    missing = {name: sorted(spans) for name, spans in by_file.items() if name not in held}
    asked = ranks.gather(missing)
    if not any(asked):
        return
    wanted = {(name, span) for part in asked for name, spans in part.items() for span in spans}
    own = _needed(manifest, section)
    mine = {(name, span) for name, span in wanted if name in own}
    sent = ranks.collect(lambda: {(name, span): held[name].part(*span) for name, span in sorted(mine)})
    received = {key: content for part in sent for key, content in part.items()}
    for name, spans in missing.items():
        parts = {span[0]: received[name, span] for span in spans if (name, span) in received}
        if parts:  # a shard that no rank has is reported when it is read
            held[name] = MemoryFile(manifest.files[name].size, parts)
