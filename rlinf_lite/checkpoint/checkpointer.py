"""Save and load of one rank, together with all others: aside, hash, fsync, manifest, rename.

Knows tensors, ranks and files. What the state is (a dict of tensors and `Stateful`) the caller says.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful

from rlinf_lite import faults
from rlinf_lite.checkpoint import layout, rng
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.errors import CheckpointError, SaveError, StateMismatch
from rlinf_lite.checkpoint.files import HashingFileSystem, sync_dir, write_durably
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.safe_reader import SafeReader, TensorsOnlyPlanner, missing_and_extra, read_metadata

State = Mapping[str, Any]
"""Nested dicts of tensors (plain or DTensor), or `Stateful` objects that give and take such dicts."""


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
    """False: written by another number of ranks, so each generator was derived anew from (seed, step, rank)."""


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
        """
        started = time.perf_counter()
        stage = self.ranks.first(lambda: self._open_stage(step))
        try:
            records = self._write_shards(step, stage, state)
            superseded = self.ranks.first(lambda: self._commit(step, stage, records, data, info))
        except OSError as error:
            self.ranks.first(lambda: shutil.rmtree(stage, ignore_errors=True))
            raise SaveError(f"checkpoint {layout.step_dir(self.root, step)} was not saved: {_explain(error)}") from error
        num_bytes = sum(record.size for record in records.values())
        return SaveReport(
            path=layout.step_dir(self.root, step),
            num_bytes=num_bytes,
            save_seconds=time.perf_counter() - started,
            superseded=superseded,
        )

    def _open_stage(self, step: int) -> Path:
        stage = layout.staging_dir(self.root, step)
        try:
            (stage / layout.ACTOR).mkdir(parents=True)
            (stage / layout.DATA).parent.mkdir()
        except OSError as error:
            raise SaveError(f"checkpoint {layout.step_dir(self.root, step)} was not saved: {_explain(error)}") from None
        return stage

    def _write_shards(self, step: int, stage: Path, state: State) -> dict[str, FileRecord]:
        """All ranks write their shards; returns the records of all files, on every rank."""
        rank = self.ranks.rank
        files = HashingFileSystem(lambda path: faults.reach("save.write", step=step, rank=rank, path=path))
        writer = dcp.FileSystemWriter(stage / layout.ACTOR, overwrite=False)
        writer.fs = files
        whole = {**state, rng.key(rank): rng.capture()}
        try:
            dcp.save(whole, storage_writer=writer, process_group=self.ranks.group, no_dist=not self.ranks.distributed)
        except CheckpointException as failure:
            failed, (error, _) = min(failure.failures.items())
            cause = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")
            cause.add_note(f"on rank {failed}")
            raise cause from None
        mine = {path.relative_to(stage).as_posix(): record for path, record in files.records.items()}
        return {name: record for records in self.ranks.gather(mine) for name, record in records.items()}

    def _commit(
        self, step: int, stage: Path, records: dict[str, FileRecord], data: Mapping[str, Any], info: Mapping[str, Any]
    ) -> Path | None:
        """Rank 0: the small files, the manifest last, everything durable, then the name."""
        faults.reach("save.data", step=step, path=str(stage))
        records[layout.DATA] = write_durably(stage / layout.DATA, _to_bytes(data))
        for folder in (stage / layout.ACTOR, (stage / layout.DATA).parent):
            sync_dir(folder)
        manifest = Manifest(step=step, world_size=self.ranks.size, files=records, info=dict(info))
        faults.reach("save.manifest", step=step, path=str(stage))
        write_durably(stage / layout.MANIFEST, manifest.to_json().encode())
        sync_dir(stage)
        final = layout.step_dir(self.root, step)
        superseded = layout.set_aside(final) if final.exists() else None
        faults.reach("save.rename", step=step, path=str(stage))
        os.rename(stage, final)
        sync_dir(self.root)
        faults.reach("save.committed", step=step, path=str(stage))
        return superseded

    def load(self, path: Path, state: State, *, verify: str = "full") -> LoadReport:
        """Fill ``state`` in place from the checkpoint ``path``, and restore this rank's generators.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `manifest.read` and `manifest.verify`.
            StateMismatch: the checkpoint holds other keys or shapes than ``state``; lists them.
        """
        started = time.perf_counter()
        manifest = self.ranks.first(lambda: _verified(path, verify))
        same_ranks = manifest.world_size == self.ranks.size
        whole = dict(state)
        if same_ranks:
            whole[rng.key(self.ranks.rank)] = rng.capture()
        self.ranks.everywhere(lambda: check_keys(path / layout.ACTOR, whole))
        try:
            dcp.load(
                whole,
                storage_reader=SafeReader(path / layout.ACTOR),
                planner=TensorsOnlyPlanner(),
                process_group=self.ranks.group,
                no_dist=not self.ranks.distributed,
            )
        except CheckpointException as failure:
            rank, (error, _) = min(failure.failures.items())
            raise CheckpointError(f"{path}: rank {rank} could not load it: {error}") from error
        if same_ranks:
            rng.restore(whole[rng.key(self.ranks.rank)])
        else:
            rng.reseed(self.seed, manifest.step, self.ranks.rank)
        return LoadReport(
            path=path, manifest=manifest, load_seconds=time.perf_counter() - started, rng_restored=same_ranks
        )


def read_data(path: Path) -> dict[str, Any]:
    """``data/data.pt`` of a checkpoint: plain values and tensors; anything else is refused."""
    return torch.load(path / layout.DATA, weights_only=True)


def check_keys(actor_dir: Path, state: State) -> None:
    """Compare what ``state`` asks for with what the DCP folder holds, other ranks' generators aside.

    Raises:
        StateMismatch: lists missing keys, extra keys and different shapes.
    """
    metadata = read_metadata(actor_dir)
    wanted = flatten(state)
    missing, extra = missing_and_extra(wanted, metadata)
    extra = [key for key in extra if not key.startswith("rng.")]
    problems = [f"missing: {_some(missing)}"] * bool(missing) + [f"not asked for: {_some(extra)}"] * bool(extra)
    for key in wanted.keys() - set(missing):
        held = metadata.state_dict_metadata[key]
        if isinstance(held, TensorStorageMetadata) and held.size != wanted[key].shape:
            problems.append(f"{key} is {list(held.size)}, the model's is {list(wanted[key].shape)}")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise StateMismatch(f"{actor_dir} is a checkpoint of another model or optimizer: {shown}")


def flatten(state: State, prefix: str = "") -> dict[str, torch.Tensor]:
    """``{"optim.w.step": tensor}``: the names under which DCP stores nested dicts and `Stateful` objects."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Stateful):
            value = value.state_dict()
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _verified(path: Path, level: str) -> Manifest:
    manifest = manifests.read(path)
    manifests.verify(path, manifest, level)
    return manifest


def _to_bytes(data: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(data), buffer)
    return buffer.getvalue()


def _explain(error: OSError) -> str:
    where = " ".join(getattr(error, "__notes__", []))
    return f"{error.strerror or error} {f'({error.filename}) ' if error.filename else ''}{where}".strip()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
