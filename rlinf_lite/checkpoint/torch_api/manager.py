"""The plain face of this package: checkpoints of an ordinary torch script, with or without `torchrun` and FSDP2.

``manager.save(model, optimizer, metadata)``, ``manager.load(model, optimizer) -> metadata``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from rlinf_lite.checkpoint import layout, storage
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.checkpointer import Checkpointer
from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, StateMismatch
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.dcp_reader import check_size
from rlinf_lite.checkpoint.retention import METRICS, Retention
from rlinf_lite.checkpoint.saving import SaveReport
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.checkpoint.torch_api import torch_state

MODES = ("sync", "async")
_STEP_KEYS = ("step", "global_step")


class CheckpointManager:
    """Saves model, optimizer, random generators and metadata of a training script, and loads them again.

    With a process group every rank calls every method, except `get_latest_checkpoint`. A script that goes on from a
    checkpoint computes the same bits as one that never stopped, if all that it needs besides (the epoch, the state of a
    learning-rate scheduler, where it is in its data) is in the metadata.

    Buffers of a replicated or sharded model are saved once, so ranks should agree on them. Only one script at a time
    may save to a directory: its first save removes what killed ones left unfinished.

    Example::

        manager = CheckpointManager("checkpoints", keep=Retention(keep_last=3))
        metadata = manager.load(model, optimizer) or {"epoch": 0}
        for epoch in range(metadata["epoch"], 10):
            reward = train(model, optimizer)
            manager.save(model, optimizer, {"epoch": epoch + 1, "reward": reward})
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        *,
        keep: Retention | None = None,
        mode: Literal["sync", "async"] = "sync",
        verify: str = "full",
    ) -> None:
        """
        Args:
            save_dir: a directory, made when it is needed, or an fsspec URL.
            keep: which older checkpoints are deleted after a save; None: none.
            mode: ``sync``: `save` returns when the checkpoint is durable. ``async``: it returns at once and writes
                while the script goes on; the next ``optimizer.step()`` waits for what was not read yet. The optimizer's
                parameters must then change in its ``step`` only; all else is copied. Call `finish` at the end, or use
                the manager in a ``with`` block.
            verify: how `load` checks a checkpoint before it touches anything: ``full`` (size and sha256 of every file),
                ``size`` or ``off``.

        Raises:
            ValueError: an unknown ``mode`` or ``verify``.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: one of {', '.join(MODES)}")
        if verify not in manifests.LEVELS:
            raise ValueError(f"verify={verify!r}: one of {', '.join(manifests.LEVELS)}")
        self.save_dir = storage.absolute(storage.storage_path(save_dir))
        self.mode, self.verify = mode, verify
        self._checkpointer = Checkpointer(self.save_dir, keep=keep)
        self._fenced: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._swept = False
        self._told: set[str] = set()
        if mode == "async":  # a script that forgets `finish` still gets its last checkpoint
            weakref.finalize(self, self._checkpointer.finish)

    # -- saving

    def save(
        self, model: nn.Module, optimizer: Optimizer | None, metadata: dict[str, Any], *, step: int | None = None
    ) -> SaveReport | None:
        """Save everything as ``global_step_{step}``.

        Args:
            optimizer: None: the model alone.
            metadata: JSON values, which `load` gives back equal. Its numbers are also the metrics that
                ``Retention(keep_best=...)`` goes by.
            step: None: ``metadata["step"]`` or ``metadata["global_step"]`` if that is an int, else one more than the
                newest checkpoint's. A checkpoint of the same step is renamed, not lost.

        Returns:
            The report of the save that ended in this call: this one, or with ``mode="async"`` the one before, if any.

        Raises:
            SaveError: names rank, path and cause; with ``mode="async"`` of the save before, and this one was not begun.
            TypeError: ``metadata`` holds something that JSON would not give back; names its key.
            ValueError: ``step`` is no count, or the optimizer holds a parameter that the model does not have.
        """
        before, ranks = self.finish(), self._checkpointer.ranks
        is_async = self.mode == "async"
        if not self._swept:  # not before: who only loads does not own the directory
            ranks.first(lambda: layout.sweep(self.save_dir))
            self._swept = True
        plain = ranks.together(lambda: plain_metadata(metadata))
        number = ranks.first(lambda: self._step(step, plain))
        state = ranks.together(lambda: torch_state.capture(model, optimizer, copy=is_async))
        data = {**state.data, "metadata": plain}
        info = {"tied": state.tied, METRICS: _numbers(plain)}
        if not is_async:
            return self._tell(self._checkpointer.save(number, state.tensors, data=data, info=info))
        self._checkpointer.start(number, state.tensors, data=data, info=info)
        if optimizer is not None:
            self._guard(optimizer)
        return before

    def _step(self, given: int | None, metadata: Mapping[str, Any]) -> int:
        if given is not None:
            if type(given) is not int or given < 0:
                raise ValueError(f"step={given!r}: give the number of completed steps, 0 or more")
            return given
        for key in _STEP_KEYS:
            if type(value := metadata.get(key)) is int and value >= 0:
                return value
        newest = self.get_latest_checkpoint()
        return 1 if newest is None else (layout.step_of(newest) or 0) + 1

    def _guard(self, optimizer: Optimizer) -> None:
        """Let every later step of ``optimizer`` wait for a save that still reads from its tensors."""
        if optimizer not in self._fenced:
            checkpointer = self._checkpointer
            optimizer.register_step_pre_hook(lambda *_: checkpointer.fence())
            self._fenced.add(optimizer)

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight (``mode="async"``).

        Returns:
            Its report; None if there was none.

        Raises:
            SaveError: it failed; names rank, path and cause. Raised once, by `finish`, or the next `save` or `load`.
        """
        report = self._checkpointer.finish()
        return None if report is None else self._tell(report)

    def _tell(self, report: SaveReport) -> SaveReport:
        """Warn of rules without candidates, once of each."""
        for reason in report.idle if self._checkpointer.ranks.rank == 0 else ():
            if (rule := reason.partition(":")[0]) not in self._told:
                self._told.add(rule)
                warnings.warn(f"{self.save_dir}: {reason}", stacklevel=3)
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # -- loading

    def get_latest_checkpoint(self) -> StoragePath | None:
        """The newest committed checkpoint, None if there is none. Whether it verifies is asked by `load` only."""
        return next(iter(layout.committed(self.save_dir)), None)

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any] | None:
        """Put model, optimizer and random generators back to where a checkpoint found them.

        Args:
            optimizer: None: the weights and buffers only; generators are left alone as well.
            checkpoint_path: None: the newest in ``save_dir`` that verifies, with a warning for each one stepped over.

        Returns:
            The checkpoint's metadata (``{"step": N}`` if it was not written by a `CheckpointManager`); None, and
            nothing was touched, if no path was given and ``save_dir`` holds no checkpoint.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: the given checkpoint, or each in ``save_dir``, is none,
                is damaged, or asks for what no checkpoint needs. Model and optimizer were not touched.
            StateMismatch: the checkpoint is one of another model or optimizer; says how. Nothing was touched.
            SaveError: an earlier save with ``mode="async"`` failed.
        """
        self.finish()
        ranks = self._checkpointer.ranks
        path, skipped = ranks.first(lambda: self._find(checkpoint_path))
        for reason in skipped if ranks.rank == 0 else ():
            warnings.warn(f"stepped over a newer checkpoint: {reason}", stacklevel=2)
        return None if path is None else self._load(path, model, optimizer)

    def _find(self, given: str | os.PathLike[str] | None) -> tuple[StoragePath | None, list[str]]:
        """A checkpoint that verifies, and why newer ones do not."""
        if given is not None:
            path = storage.absolute(storage.storage_path(given))
            manifests.read_verified(path, self.verify)
            return path, []
        skipped: list[str] = []
        for path in layout.committed(self.save_dir):
            try:
                manifests.read_verified(path, self.verify)
                return path, skipped
            except CheckpointError as error:
                skipped.append(str(error))
        if skipped:
            reasons = "".join(f"\n  {reason}" for reason in skipped)
            raise DamagedCheckpoint(f"none of the {len(skipped)} checkpoints in {self.save_dir} verifies:{reasons}")
        return None, []

    def _load(self, path: StoragePath, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
        ranks, whole = self._checkpointer.ranks, optimizer is not None
        data, tensors = ranks.together(lambda: _make_room(path, model, optimizer))
        report = self._checkpointer.load(path, tensors, verify="off", whole=whole)  # `_find` has verified it
        torch_state.give_back(model, optimizer, tensors, data)
        if whole and not report.rng_restored and ranks.rank == 0:
            warnings.warn(
                f"{path} was written by {report.manifest.world_size} ranks, these are {ranks.size} (or only one of the "
                "two has a GPU): random generators start anew, so later numbers differ from an unbroken run's",
                stacklevel=3,
            )
        metadata: dict[str, Any] = data.get("metadata", {"step": report.manifest.step})
        return metadata


def _make_room(
    path: StoragePath, model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain values of a checkpoint, and tensors to load its others into."""
    data = {"model": {}, "optimizer": None, **read_data(path)}
    if not isinstance(data["model"], dict) or not isinstance(data.get("metadata", {}), dict):
        raise DamagedCheckpoint(f"{path / layout.DATA}: model or metadata is no dict")
    own = torch_state.capture(model, None)
    if differing := sorted(own.data["model"].keys() ^ data["model"].keys()):
        raise StateMismatch(f"{path}: only one of checkpoint and model has {differing[0]}, a value that is no tensor")
    if optimizer is None:
        return data, own.tensors
    if data["optimizer"] is None:
        raise StateMismatch(f"{path}: holds no optimizer that a CheckpointManager saved; load(model) takes its weights")
    moments = _moments(path / layout.ACTOR)
    try:
        room = torch_state.make_room(model, optimizer, data["optimizer"], moments)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    return data, {**own.tensors, "optim": room}


def _moments(actor_dir: StoragePath) -> dict[str, TensorStorageMetadata]:
    """What the checkpoint says of its optimizer's tensors; refused if its files could not fill them."""
    held = read_metadata(actor_dir).state_dict_metadata.items()
    moments = {n: e for n, e in held if n.startswith("optim.") and isinstance(e, TensorStorageMetadata)}
    check_size(actor_dir, moments)
    return moments


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON makes of ``metadata``: a copy that is equal to it.

    Raises:
        TypeError: names a key whose value would come back as another one, or not at all.
    """
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata is a {type(metadata).__name__}, not a dict")
    _check_plain(metadata, "metadata")
    plain: dict[str, Any] = json.loads(json.dumps(metadata))
    return plain


def _check_plain(value: object, name: str) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}, a {type(key).__name__}: JSON has text as keys only")
            _check_plain(part, f"{name}[{key!r}]")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_plain(part, f"{name}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which JSON does not give back as it is: make it a number, text, a "
            "list or a dict (.item() or .tolist() of tensors and arrays)"
        )


def _numbers(metadata: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in ``metadata``: a manifest can be read by any JSON reader, and JSON has no NaN."""
    largest = sys.float_info.max
    return {
        key: float(value) for key, value in metadata.items() if type(value) in (int, float) and abs(value) <= largest
    }
