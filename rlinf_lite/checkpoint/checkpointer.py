"""Save and load of one rank, together with all others: aside, hash, fsync, manifest, rename.

Knows tensors, ranks and files. What the state is (a dict of tensors and `Stateful`) the caller says.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rlinf_lite import faults
from rlinf_lite.checkpoint import data_file, layout, rng
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import SaveError
from rlinf_lite.checkpoint.files import HashingFileSystem, sync_dir, write_durably
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.safe_reader import (
    SafeReader,
    TensorsOnlyPlanner,
    dcp_errors,
    without_single_process_warning,
)
from rlinf_lite.checkpoint.state import State, check_keys, give_back, take


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    path: Path
    num_bytes: int
    save_seconds: float
    superseded: Path | None
    """Where an older directory of the same name was moved to, if there was one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    path: Path
    manifest: Manifest
    load_seconds: float
    rng_restored: bool
    """False: written by another number of ranks, or with a GPU where now is none (or the other way round), so each
    generator was derived anew from (seed, step, rank)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """What goes into one checkpoint, taken and checked before the first byte is written."""

    tensors: dict[str, Any]
    data: bytes
    info: dict[str, Any]


class Checkpointer:
    """One rank's hand on the checkpoints in ``root``. Every method is collective over ``group``."""

    def __init__(self, root: Path, *, seed: int, group: dist.ProcessGroup | None = None) -> None:
        self.root = root
        self.seed = seed
        self.ranks = Ranks(group)

    def save(self, step: int, state: State, *, data: Mapping[str, Any], info: Mapping[str, Any]) -> SaveReport:
        """Commit a checkpoint of ``state`` and this rank's generators; return when it is durable.

        Args:
            step: completed steps; names the directory.
            state: what to save; the same keys on every rank.
            data: small plain values and tensors for ``data/data.pt`` (rank 0's are written).
            info: JSON values for the manifest (rank 0's are written).

        Raises:
            SaveError: names rank, path and cause. Nothing was committed, and what was written aside is gone.
            TypeError: ``state`` holds something that is no tensor, or ``data`` or ``info`` what could not be read back.
        """
        started, final = time.perf_counter(), layout.step_dir(self.root, step)
        content = self.ranks.together(lambda: self._take(state, data, info))
        stage = self.ranks.first(lambda: layout.staging_dir(self.root, step))
        try:
            self.ranks.first(lambda: self._open_stage(stage))
            records = self._write_shards(step, stage, content.tensors)
            num_bytes, superseded = self.ranks.first(lambda: self._commit(step, stage, records, content))
        except OSError as error:
            self.ranks.first(lambda: shutil.rmtree(stage, ignore_errors=True))
            raise SaveError(f"checkpoint {final} was not saved: {_explain(error)}") from error
        return SaveReport(
            path=final,
            num_bytes=num_bytes,
            save_seconds=time.perf_counter() - started,
            superseded=superseded,
        )

    def _take(self, state: State, data: Mapping[str, Any], info: Mapping[str, Any]) -> _Content:
        tensors = {**take(state), rng.key(self.ranks.rank): rng.capture()}
        return _Content(tensors=tensors, data=data_file.encode(data), info=json.loads(json.dumps(dict(info))))

    def _open_stage(self, stage: Path) -> None:
        if not self.root.is_dir():
            self.root.mkdir(parents=True)
            sync_dir(self.root.parent)
        (stage / layout.ACTOR).mkdir(parents=True)
        (stage / layout.DATA).parent.mkdir()

    def _write_shards(self, step: int, stage: Path, tensors: dict[str, Any]) -> dict[str, FileRecord]:
        """All ranks write their shards; returns the records of all files, on every rank."""
        rank, alone = self.ranks.rank, not self.ranks.distributed
        files = HashingFileSystem(lambda path: faults.reach("save.write", step=step, rank=rank, path=path))
        writer = dcp.FileSystemWriter(stage / layout.ACTOR, overwrite=False)
        writer.fs = files
        try:
            with without_single_process_warning():
                dcp.save(tensors, storage_writer=writer, process_group=self.ranks.group, no_dist=alone)
        except CheckpointException as failure:
            raise _cause(failure) from None
        mine = {path.relative_to(stage).as_posix(): record for path, record in files.records.items()}
        return {name: record for records in self.ranks.gather(mine) for name, record in records.items()}

    def _commit(
        self, step: int, stage: Path, records: dict[str, FileRecord], content: _Content
    ) -> tuple[int, Path | None]:
        """Rank 0: the small files, the manifest last, everything durable, then the name."""
        faults.reach("save.data", step=step, path=str(stage))
        records = {**records, layout.DATA: write_durably(stage / layout.DATA, content.data)}
        for folder in (stage / layout.ACTOR, (stage / layout.DATA).parent):
            sync_dir(folder)
        manifest = Manifest(step=step, world_size=self.ranks.size, files=records, info=content.info)
        faults.reach("save.manifest", step=step, path=str(stage))
        write_durably(stage / layout.MANIFEST, manifest.to_json().encode())
        sync_dir(stage)
        superseded = self._publish(step, stage)
        return sum(record.size for record in records.values()), superseded

    def _publish(self, step: int, stage: Path) -> Path | None:
        """Give ``stage`` its name; what had that name is set aside, and gets it back if this fails."""
        final = layout.step_dir(self.root, step)
        superseded = layout.set_aside(final) if final.exists() else None
        try:
            faults.reach("save.rename", step=step, path=str(stage))
            os.rename(stage, final)
            sync_dir(self.root)
            faults.reach("save.committed", step=step, path=str(final))
        except OSError:
            if not stage.exists():
                os.rename(final, stage)
            if superseded:
                os.rename(superseded, final)
            raise
        return superseded

    def load(self, path: Path, state: State, *, verify: str = "full") -> LoadReport:
        """Fill ``state`` in place from the checkpoint ``path``, and restore this rank's generators.

        After an error other than `StateMismatch` the contents of ``state`` are undefined.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `manifest.read` and `manifest.verify`.
            StateMismatch: the checkpoint holds other keys, shapes or types than ``state``; lists them.
        """
        started = time.perf_counter()
        manifest = self.ranks.first(lambda: manifests.read_verified(path, verify))
        reader = self.ranks.together(lambda: SafeReader(path / layout.ACTOR))
        rank, held = self.ranks.rank, reader.metadata.state_dict_metadata
        restorable = manifest.world_size == self.ranks.size and rng.same_devices(held, rank)
        wanted = self.ranks.together(lambda: take(state))
        whole = {**wanted, rng.key(rank): rng.capture()} if restorable else wanted
        self.ranks.together(lambda: check_keys(path / layout.ACTOR, reader.metadata, whole))
        self._read_shards(reader, whole)
        self.ranks.together(lambda: give_back(state, whole))
        if restorable:
            rng.restore(whole[rng.key(rank)])
        else:
            rng.reseed(self.seed, manifest.step, rank)
        seconds = time.perf_counter() - started
        return LoadReport(path=path, manifest=manifest, load_seconds=seconds, rng_restored=restorable)

    def _read_shards(self, reader: SafeReader, tensors: dict[str, Any]) -> None:
        planner, alone = TensorsOnlyPlanner(), not self.ranks.distributed
        with dcp_errors(Path(reader.path)), without_single_process_warning():
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=self.ranks.group, no_dist=alone)


def _cause(failure: CheckpointException) -> BaseException:
    """The error of the lowest rank that failed, as an OSError that says which rank that was."""
    rank, (error, _) = min(failure.failures.items(), key=lambda item: item[0])
    if not isinstance(error, Exception):
        return error
    cause = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
    cause.add_note(f"on rank {rank}")
    return cause


def _explain(error: OSError) -> str:
    where = " ".join(getattr(error, "__notes__", []))
    return f"{error.strerror or error} {f'({error.filename}) ' if error.filename else ''}{where}".strip()
