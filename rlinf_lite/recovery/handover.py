"""What outlives a driver process, and the socket between a driver and its parent."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Self

SOCKET_VARIABLE = "RLINF_LITE_PARENT"
"""Environment variable: the file descriptor of the driver's end of the socket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Handover:
    """What the parent gives to a new driver."""

    started: float
    """When the first driver was started, by ``time.monotonic``; ``runner.max_time`` counts from here."""
    budget: str | None = None
    """`RestartBudget.to_json`; None for the first driver."""
    address: str | None = None
    """The Ray cluster that an earlier driver joined; None if there was none, or each driver starts a Ray of its own."""
    was_built: bool = False
    """Whether an earlier driver got as far as its first step, so that newer checkpoints are this run's own."""
    restart: str = ""
    """Why the driver before this one ended; empty for the first driver."""

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        return cls(**json.loads(line))


@dataclass(kw_only=True, slots=True)
class Report:
    """What a driver has told its parent so far."""

    budget: str | None = None
    """`RestartBudget.to_json`, from the time when the config is read."""
    step: int | None = None
    """Completed steps; None until the run is built."""
    address: str | None = None
    """The Ray cluster that the driver joined."""
    is_built: bool = False
    """Whether the run is built: from now on a stop request finishes work and saves."""
    ray_lost: str = ""
    """Ray is gone, and the driver ends to be started again; empty otherwise."""
    exit_code: int | None = None
    """The driver ends in order, with this code; None for one that is killed or crashes."""

    def update(self, line: bytes) -> None:
        """Take over what one line of `ParentLink.report` says."""
        for name, value in json.loads(line).items():
            setattr(self, name, value)


class ParentLink:
    """The driver's end of the socket. Without a parent it reports to nobody."""

    def __init__(self, connection: socket.socket | None = None, handover: Handover | None = None) -> None:
        self._connection = connection
        self.handover = handover or Handover(started=time.monotonic())

    @classmethod
    def connect(cls) -> Self:
        """The link to the process that started this one; to nobody if that was not a parent of ours."""
        if (descriptor := os.environ.pop(SOCKET_VARIABLE, None)) is None:
            return cls()
        connection = socket.socket(fileno=int(descriptor))
        connection.set_inheritable(False)
        line = b""
        while not line.endswith(b"\n") and (part := connection.recv(65536)):
            line += part
        return cls(connection, Handover.from_line(line) if line else None)

    @property
    def is_connected(self) -> bool:
        """Whether there is a parent, which starts a new driver when this one asks for it."""
        return self._connection is not None

    def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` in a thread of its own when the parent has ended, however it ended."""
        if self._connection is not None:
            threading.Thread(target=self._watch, args=(self._connection, gone), name="parent", daemon=True).start()

    def _watch(self, connection: socket.socket, gone: Callable[[], None]) -> None:
        with suppress(ConnectionResetError):
            while connection.recv(64):
                pass
        gone()

    def report(self, **changes: str | int | bool) -> None:
        """Tell the parent the new values of some fields of `Report`."""
        self._send(changes)

    def report_step(self, step: int) -> None:
        """Report the number of completed steps. Never waits: a parent that is stopped must not stop the run."""
        self._send({"step": step}, socket.MSG_DONTWAIT)

    def _send(self, changes: dict[str, str | int | bool], flags: int = 0) -> None:
        if self._connection is not None:
            with suppress(OSError):  # the parent is gone, which `watch` notices, or does not read just now
                self._connection.sendall(json.dumps(changes).encode() + b"\n", flags)
