"""What is known of nodes: dead, or being drained; and whether Ray itself is still there.

Ask ``RayPulse`` first: without its GCS every other question here waits, and Ray then ends this process.
"""

from __future__ import annotations

import math
import socket
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import ray
from ray._private.state import GlobalState, state

_CREDENTIALS = struct.Struct("3i")  # pid, user, group
_PROBE_SECONDS = 1.0
_END_SECONDS = 5.0


def dead(node_ids: Iterable[str]) -> set[str]:
    """Those of these nodes that Ray has declared dead, or no longer knows.

    Ray notices a killed node by missed health checks: 10-20 s with its defaults.
    """
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return set(node_ids) - alive


def draining(node_ids: Iterable[str]) -> dict[str, float]:
    """Those of these nodes that are to be given up, with when (Unix time in seconds; inf: nobody said when)."""
    wanted = set(node_ids)
    deadlines = _draining().items()
    return {node: deadline / 1000 if deadline else math.inf for node, deadline in deadlines if node in wanted}


def _draining() -> dict[str, int]:
    """Deadlines in milliseconds. Not in Ray's public interface, and not in every Ray that we support."""
    return state.get_draining_nodes() if "get_draining_nodes" in vars(GlobalState) else {}


class RayPulse:
    """Whether the Ray that this driver joined or started is still there. Cheap: to be asked about once a second.

    What a driver sees otherwise (Ray 2.60), and why it cannot wait for Ray to tell:

    - GCS dead: nothing at all in ``ray.wait``; after RAY_gcs_rpc_server_reconnect_timeout_s (60) Ray ends the process
      with exit code 1, without ``finally`` or ``atexit``.
    - Local raylet dead: nothing in ``ray.wait`` for the 10-20 s until health checks fail, but the first ``ray.put`` of
      anything, or ``ray.get`` of a large object, ends the process at once in the same way.
    - Workers of a dead raylet live on, computing, until its parent has reaped it; then they end within about a second.
      For a Ray of our own that parent is this process, so asking here reaps.
    """

    def __init__(self, patience: float = 20.0) -> None:
        """Remember the processes; to be made after ``ray.init``.

        Args:
            patience: seconds that the GCS of a joined cluster may be out of reach (it may be restarted elsewhere).
                Less than the 60 after which Ray ends this process.
        """
        context = ray.get_runtime_context()
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        raylet_socket = Path(node["RayletSocketName"])
        own = [child for child in psutil.Process().children() if str(raylet_socket.parents[1]) in _command(child)]
        self._raylet = psutil.Process(_listener(raylet_socket))
        self._gcs = next((child for child in own if child.name() == "gcs_server"), None)
        self._parts = [process for part in own for process in (part, *part.children(recursive=True))]
        self._gcs_address = context.gcs_address
        self._patience = patience
        self._answered = time.monotonic()
        self.reachable = True
        """Whether the GCS was there at the last look: questions to one that is not wait for it."""

    @property
    def private(self) -> bool:
        """Whether this driver started that Ray."""
        return self._gcs is not None

    def lost(self) -> str | None:
        """What is gone, if something is."""
        if _gone(self._raylet):
            return f"the raylet of this node (process {self._raylet.pid}) is gone"
        if self._gcs is not None:
            return f"Ray's GCS (process {self._gcs.pid}) is gone" if _gone(self._gcs) else None
        self.reachable = _answers(self._gcs_address)
        if self.reachable:
            self._answered = time.monotonic()
        elif (seconds := time.monotonic() - self._answered) > self._patience:
            return f"Ray's GCS at {self._gcs_address} has not answered for {seconds:.0f} s"
        return None

    def end(self) -> None:
        """End what is left of a Ray of our own, by process id; does nothing to a joined cluster.

        In place of ``ray.shutdown()``, which takes seven seconds without a GCS and leaves Ray's agents behind. To be
        called before ``os.execv``: the new program would inherit a dead raylet that it does not reap.
        Workers that were started after this object may live for a second more, a stopped one (SIGSTOP) for ever.
        """
        everyone = {*self._parts, *(self._below_raylet() if self.private else ())}
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=_END_SECONDS)

    def _below_raylet(self) -> list[psutil.Process]:
        return [] if _gone(self._raylet) else self._raylet.children(recursive=True)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return ""


def _listener(path: Path) -> int:
    """Id of the process that listens on a Unix socket: a raylet, which has it on its command line, too."""
    if sys.platform != "linux":
        return next(process.pid for process in psutil.process_iter() if str(path) in _command(process))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[0]


def _gone(process: psutil.Process) -> bool:
    """Whether it ended; reaps it where it is a child of this process."""
    try:
        with suppress(psutil.TimeoutExpired):
            process.wait(timeout=0)
            return True
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True
