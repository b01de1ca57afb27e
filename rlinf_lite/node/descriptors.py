"""File descriptors of another process on this machine, by which it is lent what has no name in a file system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from weakref import WeakSet, finalize


class OwnDescriptors:
    """File descriptors of this process, which are closed together: at the latest when nothing refers to this object.

    In a forked child they are closed at once: it would keep pipes open whose end others wait for.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        finalize(self, _close, self._numbers)
        _ALL.add(self)

    def add(self, number: int) -> int:
        """Own a descriptor; returns it."""
        self._numbers.append(number)
        return number

    def close(self) -> None:
        """Close all of them. May be called again."""
        _close(self._numbers)


_ALL: WeakSet[OwnDescriptors] = WeakSet()


def _close(numbers: list[int]) -> None:
    while numbers:
        os.close(numbers.pop())


def _close_all() -> None:
    for descriptors in list(_ALL):
        descriptors.close()


os.register_at_fork(after_in_child=_close_all)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteDescriptor:
    """A file descriptor of a process, which others on the machine can open as long as that process has it."""

    pid: int
    number: int
    target: str
    """What the descriptor refers to: another process or file with these numbers is not taken for it."""

    @classmethod
    def of(cls, descriptor: int) -> RemoteDescriptor:
        """One of this process.

        Raises:
            OSError: this system does not show what it refers to.
        """
        return cls(pid=os.getpid(), number=descriptor, target=os.readlink(f"/proc/self/fd/{descriptor}"))

    def open(self, flags: int) -> int:
        """Open it in this process, as `os.open`; returns a new descriptor.

        Raises:
            OSError: that process is not visible from here, may not be asked, or is gone.
        """
        path = f"/proc/{self.pid}/fd/{self.number}"
        _require(path, self.target)
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            _require(f"/proc/self/fd/{descriptor}", self.target)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _require(path: str, target: str) -> None:
    if (found := os.readlink(path)) != target:
        raise OSError(f"{path} is {found}")
