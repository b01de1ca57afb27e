"""How far other processes of the machine are, each as a number that grows. A process that waits hears it at once."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from rlinf_lite.node.descriptors import OwnDescriptors, RemoteDescriptor
from rlinf_lite.node.memory import make_memory

_DRAINED_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class BellAddress:
    """What a sender opens as a `Bell`."""

    sender: int
    numbers: RemoteDescriptor
    """Memory with the number of each sender."""
    pipe: RemoteDescriptor
    """This sender's, to wake the listener."""


class Listener:
    """Waits for the numbers of senders, which may end at any time."""

    def __init__(self, num_senders: int) -> None:
        """
        Raises:
            OSError: this system has no memory or pipes that others can open.
        """
        self._heard: list[int] = []
        self._ends, self._lent = OwnDescriptors(), OwnDescriptors()
        memory = self._lent.add(make_memory(8 * num_senders))
        self._numbers = np.frombuffer(mmap.mmap(memory, 8 * num_senders), np.int64)
        numbers = RemoteDescriptor.of(memory)
        self.addresses: list[BellAddress] = []
        """By sender. Needed until the first `wait`, before which each must have opened its own."""
        for sender in range(num_senders):
            reading, writing = os.pipe()
            self._heard.append(self._ends.add(reading))
            pipe = RemoteDescriptor.of(self._lent.add(writing))
            self.addresses.append(BellAddress(sender=sender, numbers=numbers, pipe=pipe))

    def wait(self, number: int) -> None:
        """Return when every sender is at ``number`` or further.

        Raises:
            BrokenPipeError: one has ended, or closed its bell, before.
        """
        self._lent.close()  # or a pipe would not end with its sender
        for sender, reading in enumerate(self._heard):
            while self._numbers[sender] < number:
                if not os.read(reading, _DRAINED_BYTES) and self._numbers[sender] < number:
                    raise BrokenPipeError(f"sender {sender} has ended at {self._numbers[sender]}, before {number}")


class Bell:
    """One sender's side, for several listeners."""

    def __init__(self, addresses: Sequence[BellAddress]) -> None:
        """
        Args:
            addresses: this sender's of each listener.

        Raises:
            OSError: as `RemoteDescriptor.open`.
        """
        self._pipes: list[int] = []
        self._numbers: list[tuple[np.ndarray, int]] = []
        self._ends = OwnDescriptors()
        for address in addresses:
            descriptor = address.numbers.open(os.O_RDWR)
            try:
                self._numbers.append((np.frombuffer(mmap.mmap(descriptor, 0), np.int64), address.sender))
            finally:
                os.close(descriptor)
            self._pipes.append(self._ends.add(address.pipe.open(os.O_WRONLY | os.O_NONBLOCK)))

    def ring(self, number: int) -> None:
        """Let all listeners know that this sender is at ``number``. One that is gone does not matter."""
        # A process that sees the number must see what was written before. An x86 processor keeps the order of writes;
        # with another one nothing but the checksums of weights would notice.
        for numbers, sender in self._numbers:
            numbers[sender] = number
        for pipe in self._pipes:
            with suppress(BrokenPipeError, BlockingIOError):  # a full pipe wakes its listener too
                os.write(pipe, b"\0")

    def close(self) -> None:
        """Let the listeners know that this sender gets no further."""
        self._pipes.clear()
        self._ends.close()
