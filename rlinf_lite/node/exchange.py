"""Tensors and small objects that the ranks of a process group show each other, if all of them run on one machine.

For a small model gloo's sockets and threads take longer than what they carry: often a third of a millisecond, at times
two. Here a rank writes to memory that the others have mapped, and then a byte to a pipe of each of them.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from rlinf_lite.node.descriptors import OwnDescriptors, RemoteDescriptor
from rlinf_lite.node.memory import make_memory

_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MOST_MILLISECONDS = 2**31 - 1
"""That ``poll`` takes: 25 days."""
_CLOSED = "connection closed by rank {rank}, which has ended, or has lost another rank itself"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offered:
    """What one rank has made for the others."""

    memory: RemoteDescriptor
    bells: dict[int, RemoteDescriptor]
    """By the rank that rings it: the writing end of a pipe."""


class NodeExchange:
    """Every rank calls the same methods in the same order, as with a process group; each call waits for all ranks.

    A call raises RuntimeError, and so do all calls after it, if another rank has ended or closed its exchange, or did
    not call within the timeout.
    """

    def __init__(
        self,
        rank: int,
        slots: list[list[Tensor]],
        heard: dict[int, int],
        rung: dict[int, int],
        ends: OwnDescriptors,
        timeout_seconds: float,
    ) -> None:
        """Use `open`.

        Args:
            slots: two for each rank, uint8 [num_bytes] in shared memory.
            heard: by rank, the pipe that it rings.
            rung: by rank, the pipe that this one rings.
            ends: owns their descriptors.
        """
        self._rank, self._slots, self._heard, self._rung = rank, slots, heard, rung
        self._ends, self._timeout = ends, timeout_seconds
        self._turn, self._broken = 0, ""
        self._polls = {of: select.poll() for of in heard}
        for of, poll in self._polls.items():
            poll.register(heard[of], select.POLLIN)
        _ALL.add(self)

    @classmethod
    def open(cls, group: dist.ProcessGroup, num_bytes: int, timeout_seconds: float) -> NodeExchange | None:
        """Connect the ranks of ``group``. Collective over it.

        Args:
            num_bytes: the most that a rank shows at a time.

        Returns:
            None, on all ranks, if one of them cannot make memory, or not open another one's, as on another machine.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        ends, lent = OwnDescriptors(), OwnDescriptors()
        try:
            memory, heard, offered = _make(rank, size, num_bytes, ends, lent)
            every: list[_Offered | None] = [None] * size
            dist.all_gather_object(every, offered, group=group)
            opened = _open(rank, every, num_bytes, ends)
            are_open: list[bool] = [False] * size
            dist.all_gather_object(are_open, opened is not None, group=group)
            if memory is None or opened is None or not all(are_open):
                ends.close()
                return None
            others, rung = opened
            slots = [_slots(memory if of == rank else others[of], num_bytes) for of in range(size)]
            return cls(rank, [list(pair) for pair in zip(*slots, strict=True)], heard, rung, ends, timeout_seconds)
        except BaseException:
            ends.close()
            raise
        finally:
            lent.close()  # so that a pipe ends with the rank that rings it

    def close(self, reason: str = "connection closed by this rank") -> None:
        """Let other ranks know that this one does not call any more; own calls raise RuntimeError with ``reason``."""
        self._broken = reason
        self._ends.close()

    def fits(self, num_bytes: int) -> bool:
        """Whether so much can be shown at a time."""
        return num_bytes <= self._slots[0][0].numel()

    def show(self, mine: Tensor) -> list[Tensor]:
        """Show the others a tensor, whose shape and type is the same on all ranks, and which `fits`.

        Returns:
            Those of all ranks, by rank: in shared memory, to be read until the next call on this rank.
        """
        num_bytes = mine.nbytes
        slots = self._shown(lambda own: own[:num_bytes].view(mine.dtype).view(mine.shape).copy_(mine.detach()))
        return [slot[:num_bytes].view(mine.dtype).view(mine.shape) for slot in slots]

    def show_object(self, mine: Any) -> list[Any] | None:
        """Show the others an object; returns those of all ranks, or None if one does not fit."""
        content = pickle.dumps(mine)

        def write(own: Tensor) -> None:
            own.numpy()[:_LENGTH_BYTES].view("int64")[0] = len(content)
            if self.fits(_LENGTH_BYTES + len(content)):
                own.numpy().data[_LENGTH_BYTES : _LENGTH_BYTES + len(content)] = content

        views = [slot.numpy() for slot in self._shown(write)]
        lengths = [int(view[:_LENGTH_BYTES].view("int64")[0]) for view in views]
        if not self.fits(_LENGTH_BYTES + max(lengths)):
            return None
        return [
            pickle.loads(view.data[_LENGTH_BYTES : _LENGTH_BYTES + n]) for view, n in zip(views, lengths, strict=True)
        ]

    def _shown(self, write: Callable[[Tensor], object]) -> Sequence[Tensor]:
        """Write to this rank's slot; return those of all ranks when all of them have written.

        There are two for each, in turn. When this rank writes to one again, it has been rung for the other one, and so
        all ranks have read this one.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        slots = self._slots[self._turn]
        self._turn = 1 - self._turn
        try:
            write(slots[self._rank])
            for of, bell in self._rung.items():
                try:
                    os.write(bell, b"\0")
                except BrokenPipeError:
                    raise RuntimeError(_CLOSED.format(rank=of)) from None
            for of, poll in self._polls.items():
                if not poll.poll(min(self._timeout * 1000, _MOST_MILLISECONDS)):
                    raise RuntimeError(f"timed out waiting for rank {of} for {self._timeout:g} seconds")
                if not os.read(self._heard[of], 1):
                    raise RuntimeError(_CLOSED.format(rank=of))
        except BaseException as error:
            self.close(f"this exchange has failed: {error}")
            raise
        return slots


_ALL: WeakSet[NodeExchange] = WeakSet()


def close_exchanges() -> None:
    """Close every exchange of this process, as ``destroy_process_group`` does with the connections of its groups."""
    for exchange in list(_ALL):
        exchange.close()


def _make(
    rank: int, size: int, num_bytes: int, ends: OwnDescriptors, lent: OwnDescriptors
) -> tuple[mmap.mmap | None, dict[int, int], _Offered | None]:
    """Make this rank's memory, and a pipe for each other rank; None for them if that is not possible."""
    heard, bells = {}, {}
    try:
        descriptor = lent.add(make_memory(2 * num_bytes))
        for of in range(size):
            if of != rank:
                reading, writing = os.pipe()
                heard[of] = ends.add(reading)
                bells[of] = RemoteDescriptor.of(lent.add(writing))
        memory = mmap.mmap(descriptor, 2 * num_bytes)
        return memory, heard, _Offered(memory=RemoteDescriptor.of(descriptor), bells=bells)
    except OSError:
        return None, heard, None


def _open(
    rank: int, every: Sequence[_Offered | None], num_bytes: int, ends: OwnDescriptors
) -> tuple[dict[int, mmap.mmap], dict[int, int]] | None:
    """Open what the other ranks have made, by rank: their memory, and the pipes that this rank rings."""
    memories, rung = {}, {}
    try:
        for of, offered in enumerate(every):
            if offered is None:
                return None
            if of != rank:
                descriptor = offered.memory.open(os.O_RDWR)
                try:
                    memories[of] = mmap.mmap(descriptor, 2 * num_bytes, access=mmap.ACCESS_WRITE)
                finally:
                    os.close(descriptor)
                rung[of] = ends.add(offered.bells[rank].open(os.O_WRONLY))
    except OSError:
        return None
    return memories, rung


def _slots(memory: mmap.mmap, num_bytes: int) -> list[Tensor]:
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return [whole[:num_bytes], whole[num_bytes:]]
