"""One save: what is captured at once, what its thread does while training goes on, and what is said of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rlinf_lite import faults
from rlinf_lite.checkpoint import layout, retention, rng
from rlinf_lite.checkpoint.commit import Stage, abandon, commit, open_stage
from rlinf_lite.checkpoint.errors import CheckpointError, SaveError
from rlinf_lite.checkpoint.files import write_durably
from rlinf_lite.checkpoint.formats import data_file
from rlinf_lite.checkpoint.formats.dcp_writer import Resolve, ShardPlan, ShardPlanner, write_metadata, write_shard
from rlinf_lite.checkpoint.live import LiveTensors
from rlinf_lite.checkpoint.manifest import FileRecord, Manifest
from rlinf_lite.checkpoint.state import State, take
from rlinf_lite.checkpoint.storage import StoragePath

if TYPE_CHECKING:
    from rlinf_lite.checkpoint.checkpointer import Checkpointer

_SMALL_BYTES = 4096
"""Tensors up to this size (step counters) are copied at once: they may change outside of the optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """A committed checkpoint."""

    path: StoragePath
    step: int
    num_bytes: int
    durable_seconds: float
    """From the call to the commit."""
    stall_seconds: float
    """How long the caller was held on this rank: by `Checkpointer.start` and by `Checkpointer.fence`."""
    superseded: StoragePath | None
    """Where an older directory of the same name was moved to, if there was one."""
    removed: tuple[StoragePath, ...] = ()
    """Older checkpoints that retention has deleted."""
    problems: tuple[str, ...] = ()
    """Older checkpoints that retention could not delete, and why."""
    idle: tuple[str, ...] = ()
    """As `RetentionReport.idle`: rules that deleted nothing because no checkpoint is a candidate."""

    @property
    def gb_per_second(self) -> float:
        """Durable throughput over all ranks."""
        return self.num_bytes / 1e9 / self.durable_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What goes into one checkpoint, taken and checked before the first byte is written."""

    tensors: dict[str, Any]
    data: bytes
    info: dict[str, Any]
    resolve: Resolve | None


def capture(
    state: State, rank: int, data: Mapping[str, Any], info: Mapping[str, Any], resolve: Resolve | None
) -> Content:
    """The state as it is now: small tensors and generators copied, large tensors as they live.

    Raises:
        TypeError: something that could be saved but never loaded again.
    """
    tensors = {**_copy_small(take(state)), rng.key(rank): rng.capture()}
    return Content(
        tensors=tensors, data=data_file.encode(data), info=json.loads(json.dumps(dict(info))), resolve=resolve
    )


def _copy_small(taken: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _copy_small(value) if isinstance(value, dict) else value.clone() if _is_small(value) else value
        for name, value in taken.items()
    }


def _is_small(tensor: torch.Tensor) -> bool:
    # Of the plain type only: a sharded one is live on all ranks or on none.
    return type(tensor) is torch.Tensor and tensor.nbytes <= _SMALL_BYTES and not tensor.is_meta


class SaveJob:
    """A save in flight on this rank."""

    def __init__(self, owner: Checkpointer, planner: ShardPlanner, step: int, content: Content | Exception) -> None:
        self._owner, self._planner, self._step, self._content = owner, planner, step, content
        self._ranks = owner.ranks
        self._final = layout.step_dir(owner.root, step)
        self._live = LiveTensors(owner.staged_fraction, owner.host)
        self._thread = threading.Thread(target=self._run, name=f"save {self._final.name}", daemon=True)
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._abandoned = False
        self._held_seconds = 0.0
        self._began = 0.0

    # -- the caller's thread

    def start(self, *, held_seconds: float) -> None:
        """Begin; ``held_seconds``: how long the caller has been held already."""
        self._held_seconds = held_seconds
        self._began = time.perf_counter() - held_seconds
        self._thread.start()

    def fence(self, timeout_seconds: float) -> None:
        """See `Checkpointer.fence`."""
        began = time.perf_counter()
        self._live.fence(timeout_seconds)
        self._held_seconds += time.perf_counter() - began

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> SaveReport:
        """Wait for the end, and say how it ended. Raises as `Checkpointer.save`."""
        # Every wait inside has its own timeout, save for a write that the kernel does not return from.
        self._thread.join(2 * self._owner.timeout_seconds)
        if self._thread.is_alive():
            self._abandoned = True
            raise SaveError(f"checkpoint {self._final} was not saved: rank {self._ranks.rank} hangs in writing it")
        if self._failure is not None:
            raise self._failure
        assert self._report is not None
        return replace(self._report, stall_seconds=self._held_seconds)

    # -- its own thread

    def _run(self) -> None:
        try:
            self._report = self._save()
        except BaseException as error:
            self._planner.forget()
            self._failure = error
        finally:
            self._live.close()
            self._content = SaveError("over")  # lets go of the tensors

    def _save(self) -> SaveReport:
        stage: Stage | None = None
        try:
            plan, content = self._plan()
            stage = self._ranks.first(lambda: open_stage(self._owner.root, self._step))
            records = self._write(stage.path, plan)
            num_bytes, superseded = self._ranks.first(lambda: self._commit(stage, plan, records, content))
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

    def _plan(self) -> tuple[ShardPlan, Content]:
        """All ranks agree on who writes what; from here on each can read its live tensors."""

        def tensors() -> dict[str, Any]:
            faults.reach("save.plan", step=self._step, rank=self._ranks.rank, path=str(self._final))
            if isinstance(self._content, Exception):
                raise self._content
            return self._content.tensors

        plan, find = self._planner.plan(tensors)
        content = self._content
        assert isinstance(content, Content)

        def read(index: int) -> torch.Tensor:
            item = plan.items[index]
            tensor = find(item)
            return content.resolve(item.index.fqn, tensor) if content.resolve and tensor.is_meta else tensor

        self._live.open(plan.num_bytes(), read)
        return plan, content

    def _write(self, stage: StoragePath, plan: ShardPlan) -> list[Any]:
        """All ranks write their shards; returns each rank's (file name, record, results)."""
        rank, step = self._ranks.rank, self._step
        path = stage / layout.ACTOR / f"__{rank}_0.distcp"

        def reach(phase: str) -> None:
            faults.reach(phase, step=step, rank=rank, path=str(path))

        def write() -> tuple[str, FileRecord, Any] | None:
            reach("save.write")
            if not plan.items:
                return None
            record, results = write_shard(path, plan, self._live, lambda: reach("save.halfway"))
            reach("save.written")
            if self._abandoned:
                raise SystemExit  # hours late: the others are elsewhere by now, and must not meet this thread
            return path.name, record, results

        mine = self._ranks.together(write)
        self._live.close()
        return [part for part in self._ranks.gather(mine) if part is not None]

    def _commit(
        self, stage: Stage, plan: ShardPlan, parts: list[Any], content: Content
    ) -> tuple[int, StoragePath | None]:
        """Rank 0: the small files, the manifest last, everything durable, then the name."""
        faults.reach("save.data", step=self._step, path=str(stage.path))
        actor, metadata = stage.path / layout.ACTOR, f"{layout.ACTOR}/.metadata"
        records = {f"{layout.ACTOR}/{name}": record for name, record, _ in parts}
        records[metadata] = write_metadata(actor / ".metadata", plan, [results for _, _, results in parts])
        records[layout.DATA] = write_durably(stage.path / layout.DATA, content.data)
        manifest = Manifest(step=self._step, world_size=self._ranks.size, files=records, info=content.info)
        superseded = commit(self._owner.root, stage, manifest)
        return sum(record.size for record in records.values()), superseded

    def _retain(self) -> retention.RetentionReport:
        """Rank 0 deletes what is not kept. The checkpoint is committed: whatever happens here is no failure of it."""
        root, keep = self._owner.root, self._owner.keep
        try:
            return self._ranks.first(lambda: retention.apply(root, keep, protect=(self._final,)))
        except CheckpointError as error:
            return retention.RetentionReport(problems=(f"{root}: nothing was deleted: {error}",))


def _explain(error: OSError | CheckpointError) -> str:
    where = " ".join(getattr(error, "__notes__", []))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} {f'({error.filename}) ' if error.filename else ''}{where}".strip()
    return f"{error} {where}".strip()
