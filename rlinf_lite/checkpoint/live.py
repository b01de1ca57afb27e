"""Reading live tensors in the background while training continues, until the next optimizer step would change them.

Weights and optimizer state do not change between two optimizer steps, so a save reads them in place, without a copy.
`LiveTensors.fence` waits for the rest of the reads before the next step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from rlinf_lite.checkpoint.errors import SaveError


class HostBuffer:
    """Copies GPU tensors to pinned memory, one at a time, on its own stream, so that the copy and the training's
    kernels do not wait for each other. The buffer grows to the largest tensor, and is reused by the next save.
    """

    def __init__(self) -> None:
        self._pinned: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensor: torch.Tensor, ready: torch.cuda.Event) -> torch.Tensor:
        """Copy ``tensor`` to CPU memory as it is after the event ``ready``. The next copy overwrites the result."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._pinned is None or self._pinned.numel() < tensor.nbytes:
            self._pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        host = self._pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return host


class TensorReader(Protocol):
    """Gives the tensors of a state, by their place in a plan."""

    def reading(self, index: int) -> AbstractContextManager[torch.Tensor]:
        """Read tensor ``index``: it is in CPU memory, in a storage of just its size, and valid in the block only."""


class StillTensors:
    """A `TensorReader` in the training's thread itself, so that nothing can change the tensors meanwhile."""

    def __init__(self, find: Callable[[int], torch.Tensor], host: HostBuffer) -> None:
        """
        Args:
            find: tensor ``i`` is ``find(i)``.
        """
        self._find, self._host = find, host
        self._ready = _last_operation()

    def reading(self, index: int) -> AbstractContextManager[torch.Tensor]:
        """As `TensorReader.reading`."""
        tensor = self._find(index).detach()
        if tensor.is_cuda:
            assert self._ready is not None
            tensor = self._host.copy(tensor, self._ready)
        return nullcontext(exact(tensor))


class LiveTensors:
    """Tensors that a save reads one by one in its own thread, while `fence` holds back the thread that changes them."""

    def __init__(self, staged_fraction: float, host: HostBuffer) -> None:
        """Call it in the training's thread, while the tensors hold the values to save.

        Args:
            staged_fraction: the fraction of the bytes that `fence` may copy to memory instead of waiting.
        """
        self._staged_fraction, self._host = staged_fraction, host
        self._ready = _last_operation()
        self._changed = threading.Condition()
        self._find: Callable[[int], torch.Tensor] = _nothing
        self._num_bytes: dict[int, int] | None = None  # of tensors that are still to be read; None until `open`
        self._allowed = 0.0
        self._staged: dict[int, torch.Tensor] = {}
        self._current: int | None = None
        self._closed = False
        self._abandoned = False

    # -- called by the save's thread

    def open(self, num_bytes: list[int], find: Callable[[int], torch.Tensor]) -> None:
        """Declare what will be read: tensor ``i`` is ``find(i)``, of ``num_bytes[i]`` bytes."""
        with self._changed:
            self._find, self._num_bytes = find, dict(enumerate(num_bytes))
            self._allowed = self._staged_fraction * sum(num_bytes)
            self._changed.notify_all()

    @contextmanager
    def reading(self, index: int) -> Iterator[torch.Tensor]:
        """As `TensorReader.reading`.

        Raises:
            SaveError: `fence` stopped waiting, so the tensors may mix two steps.
        """
        assert self._num_bytes is not None
        with self._changed:
            self._check()
            self._current = index
            tensor = self._staged.pop(index, None)
            if tensor is not None:
                self._read(index)
        try:
            if tensor is None:
                tensor = self._find(index).detach()
                if tensor.is_cuda:
                    assert self._ready is not None
                    tensor = self._host.copy(tensor, self._ready)
                    with self._changed:
                        self._read(index)
            yield exact(tensor)
        finally:
            with self._changed:
                self._read(index)
        with self._changed:
            self._check()  # the optimizer step may have run while this tensor was written

    def _check(self) -> None:
        if self._abandoned:
            raise SaveError("abandoned, because the next optimizer step could not wait any longer")

    def _read(self, index: int) -> None:
        assert self._num_bytes is not None
        self._num_bytes.pop(index, None)
        self._current = None
        self._changed.notify_all()

    def close(self) -> None:
        """End the reads, whether or not all tensors were read."""
        with self._changed:
            self._closed = True
            self._staged.clear()
            self._find = _nothing
            self._changed.notify_all()

    # -- called by the training's thread

    def fence(self, timeout_seconds: float) -> None:
        """Return when the tensors may change. The last ``staged_fraction`` of them is copied instead of waited for.

        After ``timeout_seconds`` the save is abandoned: training continues, and the save fails.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            in_time = self._changed.wait_for(self._little_is_left, deadline - time.monotonic())
            if in_time and not self._closed:
                self._stage()
                in_time = self._changed.wait_for(
                    lambda: self._current is None or self._closed, deadline - time.monotonic()
                )
            self._abandoned = self._abandoned or not in_time

    def _little_is_left(self) -> bool:
        return self._closed or (self._num_bytes is not None and sum(self._num_bytes.values()) <= self._allowed)

    def _stage(self) -> None:
        assert self._num_bytes is not None
        for index in self._num_bytes:
            if index != self._current and index not in self._staged:
                self._staged[index] = self._find(index).detach().to("cpu", copy=True)


def _last_operation() -> torch.cuda.Event | None:
    """Of the GPU, on which the optimizer step may still be running; None without one."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None


def _nothing(index: int) -> torch.Tensor:
    raise LookupError(f"tensor {index} was asked for outside of `open` and `close`")


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a storage of just their size; contiguous tensors are not copied.

    ``torch.save`` writes whole storages, so a view of ten rows would write the other thousand rows too.
    """
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
