"""Whether the Ray that this driver joined or started is still there, seen from outside: by processes and sockets."""

from __future__ import annotations

import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from rlinf_lite.cluster import own_ray
from rlinf_lite.ports import connection_error

_CREDENTIALS = struct.Struct("3i")  # pid, user, group
_PROBE_SECONDS = 1.0
_FRESH_SECONDS = 0.1
"""An answer of the GCS counts for this long, so that several questions in a row need one connection."""


class RayPulse:
    """Tells whether the Ray that this driver joined or started is still there. Cheap enough to ask once per second.

    A driver cannot wait for Ray to report its own end. This is what happens (Ray 2.60):

    - GCS dead: ``ray.wait`` shows nothing; after RAY_gcs_rpc_server_reconnect_timeout_s (60) Ray ends the process with
      exit code 1, without ``finally`` or ``atexit``.
    - Local raylet dead: ``ray.wait`` shows nothing for the 10-20 s until health checks fail, but the first ``ray.put``
      of anything, or ``ray.get`` of a large object, ends the process at once in the same way.
    - Workers of a dead raylet keep computing until its parent has reaped it; then they end within about a second. The
      parent of a Ray of our own is this process, and asking here reaps it.
    """

    def __init__(self, patience: float = 20.0) -> None:
        """Remember Ray's processes. Create it after ``ray.init``.

        Args:
            patience: seconds that the GCS of a joined cluster may be out of reach, because it may be restarted
                elsewhere. Less than the 60 after which Ray ends this process.
        """
        context = ray.get_runtime_context()
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        self._raylet = psutil.Process(_listener(Path(node["RayletSocketName"])))
        self.private = own_ray.started()
        """Whether this driver started that Ray."""
        local = [(self._raylet, "the raylet of this node"), *([(_own_gcs(), "Ray's GCS")] if self.private else [])]
        self._local = [(_Ending(process), process, name) for process, name in local]
        self._head = None if self.private else Head(context.gcs_address, patience)

    @property
    def reachable(self) -> bool:
        """Whether the GCS answered when it was last checked: Ray's calls wait for one that does not."""
        return self._head is None or self._head.reachable

    def ended(self) -> str | None:
        """Return which of Ray's processes on this machine is gone; None if all are there. Takes 2 us on Linux."""
        for ending, process, name in self._local:
            if ending.is_there:
                return f"{name} (process {process.pid}) is gone"
        return None

    def lost(self) -> str | None:
        """As `ended`; also asks whether the GCS of a joined cluster answers."""
        if (gone := self.ended()) is not None or self._head is None:
            return gone
        return self._head.lost()

    def end(self) -> None:
        """End what is left of a Ray of our own, by process id; does nothing to a joined cluster.

        Workers of a dead raylet may live for a second more, a stopped one (SIGSTOP) until it is continued.
        """
        if self.private:
            own_ray.end()


class Head:
    """Tells whether something accepts connections at the address of a joined cluster's GCS."""

    def __init__(self, address: str, patience: float) -> None:
        """
        Args:
            address: ``host:port``.
            patience: seconds that it may be out of reach.
        """
        self._address, self._patience = address, patience
        self._answered = time.monotonic()
        self.reachable = True
        """Whether it answered when it was last checked."""

    def lost(self) -> str | None:
        """Return a message if it was out of reach for too long, else None. Makes one connection for several calls."""
        if self.reachable and time.monotonic() - self._answered < _FRESH_SECONDS:
            return None
        self.reachable = connection_error(self._address, _PROBE_SECONDS) is None
        if self.reachable:
            self._answered = time.monotonic()
        elif (seconds := time.monotonic() - self._answered) > self._patience:
            return f"Ray's GCS at {self._address} has not answered for {seconds:.0f} s"
        return None


class _Ending:
    """Notices the end of one process, which need not be a child of this one."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._poll = select.poll()
        self._file: int | None = None
        with suppress(AttributeError, OSError):  # not Linux, or one without them
            self._file = os.pidfd_open(process.pid)
            self._poll.register(self._file, select.POLLIN)

    @property
    def is_there(self) -> bool:
        """Whether the process has ended; reaps it if it is a child of this one."""
        return (self._file is None or bool(self._poll.poll(0))) and _gone(self._process)


def _own_gcs() -> psutil.Process:
    for part in own_ray.roots(os.getpid()):
        with suppress(psutil.NoSuchProcess):
            if part.name() == "gcs_server":
                return part
    raise ProcessLookupError("Ray's GCS is gone")


def _listener(path: Path) -> int:
    """Return the id of the process that listens on a Unix socket: a raylet, whose command line names the socket."""
    if sys.platform != "linux":
        return next(process.pid for process in psutil.process_iter() if str(path) in own_ray.command(process))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    return pid


def _gone(process: psutil.Process) -> bool:
    """Return whether a process has ended; reaps it if it is a child of this one."""
    try:
        dead = bool(process.status() == psutil.STATUS_ZOMBIE)  # before wait(): a child seen dead here is reaped there
        with suppress(psutil.TimeoutExpired):
            process.wait(timeout=0)
            return True
        return dead
    except psutil.NoSuchProcess:
        return True
