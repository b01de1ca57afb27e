"""Per-rank saver and loader of sharded checkpoints: saves in the background or not, and loads.

The state is a dict of tensors and `Stateful` objects; what it means is up to the caller.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from rlinf_lite.checkpoint import layout, loading, storage
from rlinf_lite.checkpoint.file_state import FileState
from rlinf_lite.checkpoint.formats.dcp_writer import Resolve, ShardPlanner
from rlinf_lite.checkpoint.live import HostBuffer
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.reports import LoadReport, SaveReport
from rlinf_lite.checkpoint.retention import Retention
from rlinf_lite.checkpoint.saving import Content, SaveJob, SaveSettings, capture
from rlinf_lite.checkpoint.sections import Section
from rlinf_lite.checkpoint.state import State


class Checkpointer:
    """Saves to and loads from ``root``. Every method is collective over all ranks unless its docstring says otherwise.

    A checkpoint has a section (a directory such as ``actor/``) per trainer. Each rank writes and reads its own section,
    with the ranks that gave the same ``section``; all sections are committed together.

    It works without a process group, for a single rank. With one it creates its own gloo group over all ranks, so that
    a save in the background does not interfere with the training's collectives.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        seed: int = 0,
        keep: Retention | None = None,
        staged_fraction: float = 0.1,
        timeout_seconds: float = 1800.0,
        section: str = layout.ACTOR,
    ) -> None:
        """
        Args:
            root: a directory, or an fsspec URL.
            seed: a new RNG state is derived from it where the saved one does not fit (another number of ranks).
            keep: which older checkpoints to keep after each save; None keeps all.
            staged_fraction: the fraction of the state's bytes that `fence` may copy to memory instead of waiting.
            timeout_seconds: how long a rank waits for the others in a save or load, and `fence` for the storage.
            section: what this rank's state is: lower-case letters, digits and ``_``. Ranks may give different ones.

        Raises:
            ValueError: ``section`` is not such a name, on any rank.
        """
        self.root = storage.storage_path(root)
        self.seed = seed
        self.ranks = Ranks.of_all(timeout_seconds)
        self.section = Section.agree(self.ranks, section)
        self._settings = SaveSettings(
            root=self.root,
            ranks=self.ranks,
            section=self.section,
            planner=ShardPlanner(self.ranks, self.section),
            host=HostBuffer(),
            keep=keep or Retention(),
            staged_fraction=staged_fraction,
            timeout_seconds=timeout_seconds,
        )
        self._job: SaveJob | None = None

    def save(
        self,
        step: int,
        state: State | FileState,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        resolve: Resolve | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> SaveReport:
        """Save ``state`` and this rank's RNG state as a checkpoint; returns when it is durable and committed.

        Args:
            step: the number of completed steps; names the directory.
            state: what to save, with the same keys on every rank of the section; or a `FileState` on every rank.
            data: small plain values and tensors for ``data/data.pt`` (those of rank 0 are written).
            info: JSON values for the manifest (those of rank 0 are written).
            resolve: returns the tensor of a name when it is to be written, where ``state`` has one on the meta device.
            extra: further files of this rank in its section, which no load reads: content by name, as of
                `FileState.files`. Nobody may change its tensors until the save has ended.

        Raises:
            SaveError: names rank, path and cause. Nothing was committed, and the temporary files are removed.
            TypeError: ``state`` holds something other than tensors, or ``data`` or ``info`` something that could not be
                read back.
        """
        self.start(step, state, data=data, info=info, resolve=resolve, extra=extra)
        report = self.finish()
        assert report is not None
        return report

    def start(
        self,
        step: int,
        state: State | FileState,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        resolve: Resolve | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Start a `save` in the background. RNG state, ``data``, ``info`` and small tensors are copied now; a thread
        reads the other tensors of ``state`` in place, so `fence` must be called before they change.

        At most one save is in flight: this call waits for an earlier one.

        Raises:
            SaveError, TypeError: of an earlier save whose result `poll` or `finish` has not returned.
        """
        began = time.perf_counter()
        self.finish()
        content: Content | Exception
        try:
            content = capture(state, step, self.ranks.rank, data or {}, info or {}, resolve, extra)
        except Exception as error:  # sent to the other ranks, which would wait for this one
            content = error
        self._job = SaveJob(self._settings, step, content)
        self._job.start(held_seconds=time.perf_counter() - began)

    def fence(self) -> None:
        """Call it right before the state changes (`optimizer.step`): returns when the save has read all it needs.
        If that takes longer than ``timeout_seconds``, the save fails and not the caller. Not collective.
        """
        if self._job is not None:
            self._job.fence()

    @property
    def saving(self) -> bool:
        """Whether a save was started whose result `poll` or `finish` has not returned yet. Not collective."""
        return self._job is not None

    def poll(self) -> SaveReport | None:
        """The report of a save that has ended on this rank; None if there is none. Returned once. Not collective.

        Raises:
            SaveError, TypeError: as `save`, once.
        """
        if self._job is None or not self._job.has_ended():
            return None
        return self.finish()

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight and return its report; None if there is none. Raises as `poll`."""
        job, self._job = self._job, None
        return None if job is None else job.result()

    def load(
        self, path: str | os.PathLike[str], state: State | FileState, *, verify: str = "full", whole: bool = True
    ) -> LoadReport:
        """Fill ``state`` in place from the checkpoint ``path``, and restore this rank's RNG state.

        Each rank reads only what it needs, except that with ``verify="full"`` one rank per file reads and hashes all of
        it. After an error other than `StateMismatch` and `SectionMismatch` the content of ``state`` is undefined.

        Args:
            verify: ``full`` (size and hash of every file), ``size`` or ``off``.
            whole: False loads only the top-level names of ``state`` (the weights of a `FileState`), and leaves the RNG
                state as it is. Sections for
                which no rank has a ``state`` are then only verified; a rank with an empty one loads nothing.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `manifest.read` and `manifest.verify`.
            SectionMismatch: the checkpoint lacks this section, or (``whole``) has one for which there is no rank; or
                it holds DCP shards and ``state`` is a `FileState`, or the other way round.
            StateMismatch: the section holds other keys, shapes or types than ``state``; lists them.
        """
        self.finish()
        return loading.load(
            self.ranks, self.section, storage.storage_path(path), state, seed=self.seed, verify=verify, whole=whole
        )
