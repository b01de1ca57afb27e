"""`CheckpointManager`: checkpoints for an ordinary torch training script, with or without `torchrun` and FSDP2.

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
from rlinf_lite.checkpoint.candidates import Candidates
from rlinf_lite.checkpoint.checkpointer import Checkpointer
from rlinf_lite.checkpoint.errors import CheckpointError, DamagedCheckpoint, StateMismatch
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.formats.dcp_metadata import read_metadata
from rlinf_lite.checkpoint.formats.dcp_reader import check_size
from rlinf_lite.checkpoint.reports import SaveReport
from rlinf_lite.checkpoint.retention import METRICS, Retention
from rlinf_lite.checkpoint.storage import StoragePath
from rlinf_lite.checkpoint.torch_api import torch_state

MODES = ("sync", "async")
_STEP_KEYS = ("step", "global_step")


class CheckpointManager:
    """Saves model, optimizer, RNG state and metadata of a training script, and loads them again.

    With a process group every rank must call every method, except `get_latest_checkpoint`. A script that resumes from a
    checkpoint is bitwise identical to one that never stopped, if the metadata holds everything else that it needs: the
    epoch, the state of a learning-rate scheduler, the position in its data.

    Buffers of a replicated or sharded model are saved once, so ranks should agree on them. Only one script at a time
    may save to a directory: its first save removes what killed saves left there.

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
            save_dir: a directory, created when needed, or an fsspec URL.
            keep: which older checkpoints to keep after a save; None keeps all.
            mode: with ``sync``, `save` returns when the checkpoint is durable. With ``async`` it returns at once and
                writes while the script continues; the next ``optimizer.step()`` waits until everything is read. The
                parameters must then change only in ``step``; everything else is copied. Call `finish` at the end, or
                use the manager in a ``with`` block.
            verify: how `load` verifies a checkpoint before it changes anything: ``full`` (size and hash of every
                file), ``size`` or ``off``.

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
        self._warned: set[str] = set()
        if mode == "async":  # completes the last save of a script that does not call `finish`
            weakref.finalize(self, self._checkpointer.finish)

    # -- saving

    def save(
        self, model: nn.Module, optimizer: Optimizer | None, metadata: dict[str, Any], *, step: int | None = None
    ) -> SaveReport | None:
        """Save everything as ``global_step_{step}``.

        Args:
            optimizer: None saves the model only.
            metadata: JSON values, which `load` returns. Its numbers are also the metrics of
                ``Retention(keep_best=...)``.
            step: None means ``metadata["step"]`` or ``metadata["global_step"]`` if that is an int, else one more than
                the newest checkpoint's step. An older checkpoint of the same step is renamed, not lost.

        Returns:
            The report of the save that ended in this call: this one, or with ``mode="async"`` the previous one. None if
            there was none.

        Raises:
            SaveError: names rank, path and cause. With ``mode="async"`` the previous save failed, and this one was not
                started.
            TypeError: ``metadata`` holds something that JSON does not preserve; names its key.
            ValueError: ``step`` is not a count, or the optimizer holds a parameter that the model does not have.
        """
        before, ranks = self.finish(), self._checkpointer.ranks
        is_async = self.mode == "async"
        if not self._swept:  # only on a save: a script that only loads may share the directory
            ranks.first(lambda: layout.sweep(self.save_dir))
            self._swept = True
        plain = ranks.together(lambda: plain_metadata(metadata))
        number = ranks.first(lambda: self._step(step, plain))
        state = ranks.together(lambda: torch_state.capture(model, optimizer, copy=is_async))
        data = {**state.data, "metadata": plain}
        info = {"tied": state.tied, METRICS: _numbers(plain)}
        if not is_async:
            return self._warn(self._checkpointer.save(number, state.tensors, data=data, info=info))
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
        """Make every later step of ``optimizer`` wait for a save that still reads its tensors."""
        if optimizer not in self._fenced:
            checkpointer = self._checkpointer
            optimizer.register_step_pre_hook(lambda *_: checkpointer.fence())
            self._fenced.add(optimizer)

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight (``mode="async"``).

        Returns:
            Its report; None if no save was in flight.

        Raises:
            SaveError: it failed; names rank, path and cause. Raised once, by `finish`, or the next `save` or `load`.
        """
        report = self._checkpointer.finish()
        return None if report is None else self._warn(report)

    def _warn(self, report: SaveReport) -> SaveReport:
        """Warn once about each retention rule without a candidate."""
        for reason in report.idle if self._checkpointer.ranks.rank == 0 else ():
            if (rule := reason.partition(":")[0]) not in self._warned:
                self._warned.add(rule)
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
        """The newest committed checkpoint, not verified; None if there is none."""
        return next(iter(layout.committed(self.save_dir)), None)

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any] | None:
        """Restore model, optimizer and RNG state from a checkpoint.

        Args:
            optimizer: None loads weights and buffers only, and leaves the RNG state as it is.
            checkpoint_path: None takes the newest in ``save_dir`` that verifies, with a warning for each one that is
                stepped over.

        Returns:
            The checkpoint's metadata (``{"step": N}`` if it was not written by a `CheckpointManager`). None if no path
            was given and ``save_dir`` holds no checkpoint; then nothing was changed.

        Raises:
            NoCheckpoint, DamagedCheckpoint, UnsafeCheckpoint: the given checkpoint, or every one in ``save_dir``, does
                not exist, is damaged, or asks for what no checkpoint needs. Model and optimizer were not changed.
            StateMismatch: the checkpoint is of another model or optimizer; says how. Nothing was changed.
            SaveError: an earlier save with ``mode="async"`` failed.
        """
        self.finish()
        ranks = self._checkpointer.ranks
        path, damaged = ranks.first(lambda: self._find(checkpoint_path))
        for reason in damaged if ranks.rank == 0 else ():
            warnings.warn(f"stepped over a newer checkpoint: {reason}", stacklevel=2)
        return None if path is None else self._load(path, model, optimizer)

    def _find(self, given: str | os.PathLike[str] | None) -> tuple[StoragePath | None, list[str]]:
        """A checkpoint that verifies, and the reasons why newer ones do not."""
        if given is not None:
            path = storage.absolute(storage.storage_path(given))
            manifests.read_verified(path, self.verify)
            return path, []
        candidates = Candidates(self.save_dir, self.verify)
        for path, _ in candidates:
            return path, list(candidates.damaged.values())
        if candidates.paths:
            raise candidates.none_verifies()
        return None, []

    def _load(self, path: StoragePath, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
        ranks, whole = self._checkpointer.ranks, optimizer is not None
        data, tensors = ranks.together(lambda: _make_room(path, model, optimizer))
        report = self._checkpointer.load(path, tensors, verify="off", whole=whole)  # `_find` has verified it
        torch_state.give_back(model, optimizer, tensors, data)
        if whole and not report.rng_restored and ranks.rank == 0:
            warnings.warn(
                f"{path} was written by {report.manifest.world_size} ranks, these are {ranks.size} (or only one of the "
                "two has a GPU): the RNG state starts anew, so later numbers differ from those of an uninterrupted run",
                stacklevel=3,
            )
        metadata: dict[str, Any] = data.get("metadata", {"step": report.manifest.step})
        return metadata


def _make_room(
    path: StoragePath, model: nn.Module, optimizer: Optimizer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plain values of a checkpoint, and tensors to load its tensors into."""
    data = {"model": {}, "optimizer": None, **read_data(path)}
    if not isinstance(data["model"], dict) or not isinstance(data.get("metadata", {}), dict):
        raise DamagedCheckpoint(f"{path / layout.DATA}: model or metadata is not a dict")
    own = torch_state.capture(model, None)
    if differing := sorted(own.data["model"].keys() ^ data["model"].keys()):
        raise StateMismatch(
            f"{path}: only one of checkpoint and model has {differing[0]}, a value that is not a tensor"
        )
    if optimizer is None:
        return data, own.tensors
    if data["optimizer"] is None:
        raise StateMismatch(
            f"{path}: holds no optimizer that a CheckpointManager saved; load its weights with load(model)"
        )
    saved = _saved_optimizer(path / layout.ACTOR)
    try:
        room = torch_state.make_room(model, optimizer, data["optimizer"], saved)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from None
    return data, {**own.tensors, "optim": room}


def _saved_optimizer(directory: StoragePath) -> dict[str, TensorStorageMetadata]:
    """Shape and type of the optimizer's tensors in the checkpoint. Raises as `check_size`."""
    entries = {
        name: entry
        for name, entry in read_metadata(directory).state_dict_metadata.items()
        if name.startswith("optim.") and isinstance(entry, TensorStorageMetadata)
    }
    check_size(directory, entries)
    return entries


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``metadata`` that went through JSON and is equal to it.

    Raises:
        TypeError: names a key whose value JSON does not preserve.
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
                raise TypeError(f"{name} has the key {key!r}, a {type(key).__name__}; keys in JSON must be text")
            _check_plain(part, f"{name}[{key!r}]")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_plain(part, f"{name}[{index}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which JSON does not preserve; make it a number, text, a list or a "
            "dict (.item() or .tolist() of tensors and arrays)"
        )


def _numbers(metadata: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in ``metadata``; JSON has no NaN, and a manifest must be readable by any JSON reader."""
    largest = sys.float_info.max
    return {
        key: float(value) for key, value in metadata.items() if type(value) in (int, float) and abs(value) <= largest
    }
