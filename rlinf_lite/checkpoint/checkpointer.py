"""One rank's hand on the checkpoints of a directory: save in the background or not, and load.

Knows tensors, ranks and files. What the state is (a dict of tensors and `Stateful`) the caller says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from rlinf_lite.checkpoint import loading, storage
from rlinf_lite.checkpoint.formats.dcp_writer import Resolve, ShardPlanner
from rlinf_lite.checkpoint.live import HostBuffer
from rlinf_lite.checkpoint.loading import LoadReport
from rlinf_lite.checkpoint.ranks import Ranks
from rlinf_lite.checkpoint.retention import Retention
from rlinf_lite.checkpoint.saving import Content, SaveJob, SaveReport, capture
from rlinf_lite.checkpoint.state import State


class Checkpointer:
    """Saves to and loads from ``root``. Unless said otherwise every method is collective over all ranks.

    Without a process group it is one rank by itself. With one it makes its own over all ranks (gloo), so that a save in
    the background never meets the training's collectives.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        seed: int = 0,
        keep: Retention | None = None,
        staged_fraction: float = 0.1,
        timeout_seconds: float = 1800.0,
    ) -> None:
        """
        Args:
            root: a directory, or an fsspec URL.
            seed: from which generators start anew where they cannot be restored (another number of ranks).
            keep: which older checkpoints are deleted after each save; None: none.
            staged_fraction: how much of the state's bytes `fence` may copy to memory rather than wait.
            timeout_seconds: how long a rank waits for the others in a save or load, and `fence` for the storage.
        """
        self.root = storage.storage_path(root)
        self.seed = seed
        self.keep = keep or Retention()
        self.staged_fraction, self.timeout_seconds = staged_fraction, timeout_seconds
        self.ranks = Ranks.of_all(timeout_seconds)
        self.host = HostBuffer()
        self._planner = ShardPlanner(self.ranks)
        self._job: SaveJob | None = None

    def save(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        resolve: Resolve | None = None,
    ) -> SaveReport:
        """Commit a checkpoint of ``state`` and this rank's generators; return when it is durable.

        Args:
            step: completed steps; names the directory.
            state: what to save; the same keys on every rank.
            data: small plain values and tensors for ``data/data.pt`` (rank 0's are written).
            info: JSON values for the manifest (rank 0's are written).
            resolve: gives the tensor of a name when its turn comes, where ``state`` has one on the meta device.

        Raises:
            SaveError: names rank, path and cause. Nothing was committed, and what was written aside is gone.
            TypeError: ``state`` holds something that is no tensor, or ``data`` or ``info`` what could not be read back.
        """
        self.start(step, state, data=data, info=info, resolve=resolve)
        report = self.finish()
        assert report is not None
        return report

    def start(
        self,
        step: int,
        state: State,
        *,
        data: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """Begin a `save` and return: generators, ``data``, ``info`` and scalars are taken now, the tensors of ``state``
        are read where they are, by a thread of its own. From here on `fence` must be called before they change.

        At most one save is in flight: an earlier one is waited for, and must have been asked about with `poll` or
        `finish`, or its failure is raised here.

        Raises:
            SaveError, TypeError: of an earlier save that nobody asked about.
        """
        began = time.perf_counter()
        self.finish()
        content: Content | Exception
        try:
            content = capture(state, self.ranks.rank, data or {}, info or {}, resolve)
        except Exception as error:  # the other ranks must hear of it, instead of waiting for this one
            content = error
        self._job = SaveJob(self, self._planner, step, content)
        self._job.start(held_seconds=time.perf_counter() - began)

    def fence(self) -> None:
        """To be called right before the state changes (`optimizer.step`): returns when nothing needs to be read any
        more. Not collective. If the storage does not keep up for ``timeout_seconds``, the save fails, not the caller.
        """
        if self._job is not None:
            self._job.fence(self.timeout_seconds)

    @property
    def saving(self) -> bool:
        """Whether a save was started of whose end nobody has been told. Not collective."""
        return self._job is not None

    def poll(self) -> SaveReport | None:
        """The report of a save that has ended on this rank, once; None if there is nothing to tell. Not collective.

        Raises:
            SaveError, TypeError: as `save`, once.
        """
        if self._job is None or not self._job.has_ended():
            return None
        return self.finish()

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight, if there is one, then as `poll`."""
        job, self._job = self._job, None
        return None if job is None else job.result()

    def load(
        self, path: str | os.PathLike[str], state: State, *, verify: str = "full", whole: bool = True
    ) -> LoadReport:
        """Fill ``state`` in place from the checkpoint ``path``, and restore this rank's generators.

        Each rank reads what it needs and nothing else, except that with ``verify="full"`` each file is read whole, and
        hashed on the way, by one of them. After an error other than `StateMismatch` ``state`` is undefined.

        Args:
            verify: ``full`` (size and sha256 of every file), ``size`` or ``off``.
            whole: False: only the top-level names of ``state``; others in the checkpoint, and generators, are left.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: as `manifest.read` and `manifest.verify`.
            StateMismatch: the checkpoint holds other keys, shapes or types than ``state``; lists them.
        """
        self.finish()
        return loading.load(self.ranks, storage.storage_path(path), state, seed=self.seed, verify=verify, whole=whole)
