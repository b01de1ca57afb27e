"""One save in the background: what is copied at its start, what its thread writes, and its report."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlinf_lite import faults, rng
from rlinf_lite.checkpoint import layout, retention
from rlinf_lite.checkpoint.commit import Stage, abandon, commit, open_stage
from rlinf_lite.checkpoint.errors import CheckpointError, SaveError
from rlinf_lite.checkpoint.file_state import FileState
from rlinf_lite.checkpoint.files import HashingFile, hashed, write_durably
from rlinf_lite.checkpoint.formats import data_file
from rlinf_lite.checkpoint.formats.dcp_writer import Resolve, ShardPlanner, Taken
from rlinf_lite.checkpoint.live import HostBuffer, LiveTensors
from rlinf_lite.checkpoint.manifest import FileRecord
from rlinf_lite.checkpoint.parts import SMALL_BYTES, FilesPart, SectionPart, Written
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.reports import SaveReport
from rlinf_lite.checkpoint.sections import Section
from rlinf_lite.checkpoint.state import State, take
from rlinf_lite.checkpoint.storage import StoragePath


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What goes into one checkpoint, checked before the first byte is written."""

    taken: Taken
    extra: FilesPart
    """Files beside the section's, which no load reads."""
    data: bytes
    info: dict[str, Any]
    resolve: Resolve | None


def capture(
    state: State | FileState,
    step: int,
    rank: int,
    data: Mapping[str, Any],
    info: Mapping[str, Any],
    resolve: Resolve | None = None,
    extra: Mapping[str, object] | None = None,
) -> Content:
    """Capture the current state: small tensors and the RNG state are copied, large tensors stay live.

    Raises:
        TypeError: something that could be saved but not loaded again.
    """
    return Content(
        taken=FilesPart.of(state, step) if isinstance(state, FileState) else _tensors(state, rank),
        extra=FilesPart(extra or {}, live=False),
        data=data_file.encode(data),
        info=json.loads(json.dumps(dict(info))),
        resolve=resolve,
    )


def _tensors(state: State, rank: int) -> dict[str, Any]:
    return {**_copy_small(take(state)), rng.key(rank): rng.capture()}


def _copy_small(taken: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _copy_small(value) if isinstance(value, dict) else value.clone() if _is_small(value) else value
        for name, value in taken.items()
    }


def _is_small(tensor: torch.Tensor) -> bool:
    # Plain tensors only: a sharded one must be live on all ranks or on none.
    return type(tensor) is torch.Tensor and tensor.nbytes <= SMALL_BYTES and not tensor.is_meta


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveSettings:
    """What all saves of a `Checkpointer` have in common; see there."""

    root: StoragePath
    ranks: Ranks
    section: Section
    planner: ShardPlanner
    host: HostBuffer
    keep: retention.Retention
    staged_fraction: float
    timeout_seconds: float


class SaveJob:
    """A save in flight on this rank."""

    def __init__(self, saver: SaveSettings, step: int, content: Content | Exception) -> None:
        """
        Args:
            content: what to save; or why this rank has nothing, which the other ranks must learn.
        """
        self._saver, self._step, self._content = saver, step, content
        self._ranks, self._section = saver.ranks, saver.section
        self._final = layout.step_dir(saver.root, step)
        self._live = LiveTensors(saver.staged_fraction, saver.host)
        self._thread = threading.Thread(target=self._run, name=f"save {self._final.name}", daemon=True)
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._abandoned = False
        self._held_seconds = 0.0
        self._began = 0.0

    # -- called by the training's thread

    def start(self, *, held_seconds: float) -> None:
        """Start the thread; ``held_seconds``: how long the caller was blocked already."""
        self._held_seconds = held_seconds
        self._began = time.perf_counter() - held_seconds
        self._thread.start()

    def fence(self) -> None:
        """See `Checkpointer.fence`."""
        began = time.perf_counter()
        self._live.fence(self._saver.timeout_seconds)
        self._held_seconds += time.perf_counter() - began

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> SaveReport:
        """Wait for the end and return the report. Raises as `Checkpointer.save`."""
        # Every wait in the thread has its own timeout, except a write that the kernel does not return from.
        self._thread.join(2 * self._saver.timeout_seconds)
        if self._thread.is_alive():
            self._abandoned = True
            raise SaveError(f"checkpoint {self._final} was not saved: rank {self._ranks.rank} hangs while writing it")
        if self._failure is not None:
            raise self._failure
        assert self._report is not None
        return replace(self._report, stall_seconds=self._held_seconds)

    # -- the save's own thread

    def _run(self) -> None:
        try:
            self._report = self._save()
        except BaseException as error:
            self._saver.planner.forget()
            self._failure = error
        finally:
            self._live.close()
            self._content = SaveError("over")  # releases the tensors

    def _save(self) -> SaveReport:
        stage: Stage | None = None
        try:
            part, content = self._plan()
            stage = self._ranks.first(lambda: open_stage(self._saver.root, self._step, self._section.ranks_of))
            records = self._write(stage.path, part, content.extra)
            num_bytes, superseded = self._ranks.first(lambda: self._commit(stage, records, content))
            durable_seconds = time.perf_counter() - self._began
        except (OSError, CheckpointError) as error:
            if stage is not None and self._ranks.rank == 0:
                abandon(stage)
            raise SaveError(f"checkpoint {self._final} was not saved: {_explain(error)}") from error
        swept = self._retain()
        return SaveReport(
            path=self._final,
            step=self._step,
            num_bytes=num_bytes,
            durable_seconds=durable_seconds,
            stall_seconds=0.0,
            superseded=superseded,
            removed=swept.removed,
            problems=swept.problems,
            idle=swept.idle,
        )

    def _plan(self) -> tuple[SectionPart, Content]:
        """Agree with the other ranks on who writes what, and open the live tensors for reading."""

        def taken() -> Taken:
            faults.reach("save.plan", step=self._step, rank=self._ranks.rank, path=str(self._final))
            if isinstance(self._content, Exception):
                raise self._content
            return self._content.taken

        content = self._content
        part = self._saver.planner.plan(taken, content.resolve if isinstance(content, Content) else None)
        assert isinstance(content, Content)
        self._live.open(part.num_bytes(), part.tensor)
        return part, content

    def _write(self, stage: StoragePath, part: SectionPart, extra: FilesPart) -> dict[str, FileRecord]:
        """Write the files of all ranks, and ``.metadata`` of all sections; returns the records of these files."""
        step, section = self._step, self._section
        directory = stage / section.name

        def reach(phase: str) -> None:
            faults.reach(phase, step=step, rank=section.rank, path=str(directory / section.shard))

        @contextmanager
        def create(name: str, num_bytes: int) -> Iterator[HashingFile]:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with hashed(directory / name) as file:
                yield file

        def write() -> Written:
            reach("save.write")
            written = part.write(create, self._live, lambda: reach("save.halfway"))
            self._live.close()  # the files beside hold copies
            written.files.update(extra.write(create, self._live).files)
            if written.files:
                reach("save.written")
            if self._abandoned:
                raise SystemExit  # hours late: this thread must not take part in later collectives of the others
            return written

        mine = self._ranks.together(write)
        self._live.close()
        results = self._ranks.gather(mine.results)

        def finish_section() -> dict[str, FileRecord]:
            reach("save.metadata")
            records = {f"{section.name}/{name}": record for name, record in mine.files.items()}
            if section.is_first and (encoded := part.metadata([results[rank] for rank in section.ranks])) is not None:
                records[section.metadata] = write_durably(directory / layout.METADATA, encoded)
            return records

        return joined(self._ranks.collect(finish_section))

    def _commit(self, stage: Stage, records: dict[str, FileRecord], content: Content) -> tuple[int, StoragePath | None]:
        """Write ``data.pt`` and commit, on rank 0. Returns the size, and where an older checkpoint was moved to."""
        faults.reach("save.data", step=self._step, path=str(stage.path))
        records[layout.DATA] = write_durably(stage.path / layout.DATA, content.data)
        manifest = self._section.manifest(self._step, records, content.info)
        superseded = commit(self._saver.root, stage, manifest)
        return sum(record.size for record in records.values()), superseded

    def _retain(self) -> retention.RetentionReport:
        """Delete what is not kept, on rank 0. The save is committed, so an error here does not make it fail."""
        root, keep = self._saver.root, self._saver.keep
        try:
            return self._ranks.first(lambda: retention.apply(root, keep, protect=(self._final,)))
        except CheckpointError as error:
            return retention.RetentionReport(problems=(f"{root}: nothing was deleted: {error}",))


def joined(parts: list[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    """The records of all ranks.

    Raises:
        SaveError: two ranks have written the same file.
    """
    names = Counter(name for part in parts for name in part)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise SaveError(f"{twice[0]} was written by two ranks")
    return {name: record for part in parts for name, record in part.items()}


def _explain(error: OSError | CheckpointError) -> str:
    where = " ".join(getattr(error, "__notes__", []))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} {f'({error.filename}) ' if error.filename else ''}{where}".strip()
    return f"{error} {where}".strip()
