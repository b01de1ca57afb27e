"""The window in which a save reads tensors that training owns: who has been read, and the wait for the rest.

Between two optimizer steps nothing changes weights or moments: they are read where they are. `fence` ends the window.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rlinf_lite.checkpoint.errors import SaveError


class HostBuffer:
    """Brings tensors of a GPU to pinned memory, one at a time, on a stream of its own: no kernel of the training waits
    for the copy, nor the copy for kernels that come later. Grows to the largest tensor, and is kept for the next save.
    """

    def __init__(self) -> None:
        self._pinned: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensor: torch.Tensor, ready: torch.cuda.Event) -> torch.Tensor:
        """``tensor`` in CPU memory, as it is after the event ``ready``; overwritten by the next copy."""
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


class LiveTensors:
    """Tensors to be read one after the other by a save, in a thread of its own, while `fence` guards their owner."""

    def __init__(self, staged_fraction: float, host: HostBuffer) -> None:
        """To be made by the owner's thread, when the tensors are what they should be.

        Args:
            staged_fraction: how much of the bytes `fence` may copy to memory instead of waiting for them to be read.
        """
        self._staged_fraction, self._host = staged_fraction, host
        # The optimizer step may still be running on the GPU.
        self._ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._changed = threading.Condition()
        self._find: Callable[[int], torch.Tensor] = _nothing
        self._num_bytes: dict[int, int] | None = None  # of what was not read yet; None until `open`
        self._allowed = 0.0
        self._staged: dict[int, torch.Tensor] = {}
        self._current: int | None = None
        self._closed = False
        self._given_up = False

    # -- the save's thread

    def open(self, num_bytes: list[int], find: Callable[[int], torch.Tensor]) -> None:
        """What will be read: tensor ``i`` is ``find(i)``, of ``num_bytes[i]`` bytes."""
        with self._changed:
            self._find, self._num_bytes = find, dict(enumerate(num_bytes))
            self._allowed = self._staged_fraction * sum(num_bytes)
            self._changed.notify_all()

    @contextmanager
    def reading(self, index: int) -> Iterator[torch.Tensor]:
        """Tensor ``index`` in CPU memory, its storage no larger than itself; to be let go of after the block.

        Raises:
            SaveError: `fence` gave up waiting; what was written is no state that ever was.
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
            self._check()  # the owner may have gone on while this very tensor was written

    def _check(self) -> None:
        if self._given_up:
            raise SaveError("given up: the next optimizer step could not wait any longer")

    def _read(self, index: int) -> None:
        assert self._num_bytes is not None
        self._num_bytes.pop(index, None)
        self._current = None
        self._changed.notify_all()

    def close(self) -> None:
        """Nothing will be read any more, whether or not everything was."""
        with self._changed:
            self._closed = True
            self._staged.clear()
            self._find = _nothing
            self._changed.notify_all()

    # -- the owner's thread

    def fence(self, timeout_seconds: float) -> None:
        """Return when the owner may change its tensors. What is left to read, if little, is copied to memory.

        After ``timeout_seconds`` the save is given up instead: training goes on, and the save fails.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            in_time = self._changed.wait_for(self._little_is_left, deadline - time.monotonic())
            if in_time and not self._closed:
                self._stage()
                in_time = self._changed.wait_for(
                    lambda: self._current is None or self._closed, deadline - time.monotonic()
                )
            self._given_up = self._given_up or not in_time

    def _little_is_left(self) -> bool:
        return self._closed or (self._num_bytes is not None and sum(self._num_bytes.values()) <= self._allowed)

    def _stage(self) -> None:
        assert self._num_bytes is not None
        for index in self._num_bytes:
            if index != self._current and index not in self._staged:
                self._staged[index] = self._find(index).detach().to("cpu", copy=True)


def _nothing(index: int) -> torch.Tensor:
    raise LookupError(f"tensor {index} was asked for outside of the window")


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same values over a storage of just their size, without a copy where they lie in one piece.

    ``torch.save`` writes whole storages: a view of ten rows would bring the other thousand along.
    """
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)
