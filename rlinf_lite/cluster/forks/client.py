"""The driver's side of its fork server."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

from rlinf_lite.cluster.forks import shim

TEMPLATE_VARIABLE = "RLINF_LITE_FORK_SERVER"
"""Names a running server that becomes the driver's by forking, without importing anything again. For tests."""
MODULE = "rlinf_lite.cluster.forks.server"
_END_SECONDS = 5.0


def can_fork(device: str) -> bool:
    """Whether workers can be forked here: on Linux, without a GPU, since a process that has used CUDA cannot be."""
    return sys.platform == "linux" and (
        device == "cpu" or (device == "auto" and not glob("/dev/nvidia[0-9]*") and not glob("/dev/kfd"))
    )


class ForkServer:
    """A fork server of this process, and the command with which Ray starts workers from it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start it; does not wait until it has imported everything.

        Args:
            environment: of the workers, besides the environment of this process.
        """
        self.name = f"rlinf_lite-{os.getpid()}-{uuid4().hex}"
        self.environment = dict(environment)
        self.starts_all_workers = False
        """Whether a Ray was started whose workers all are forked from it, with that environment, unasked."""
        self._process: subprocess.Popen[bytes] | None = None
        whole = {**os.environ, **environment}
        with shim.listener(self.name) as listener:
            self._control = _branch(whole.pop(TEMPLATE_VARIABLE, ""), listener, whole) or self._spawn(listener, whole)

    def _spawn(self, listener: socket.socket, environment: Mapping[str, str]) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            files = listener.fileno(), theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, *_options(), "-m", MODULE, str(os.getpid()), *map(str, files)],
                env=environment,
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the driver
            )
        return ours

    def preload(self, modules: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """Have it import these too, before it forks the workers that are asked for from now on.

        Args:
            environment: variables that the modules read, in addition to its own.
        """
        order = json.dumps({"modules": [*modules], "environment": {**environment}})
        with suppress(OSError):  # it has ended: Ray's workers are started in the plain way
            self._control.sendall(f"{order}\n".encode())

    @property
    def command(self) -> list[str]:
        """What Ray starts in place of Python."""
        return [sys.executable, "-S", "-I", str(Path(shim.__file__)), self.name]

    @property
    def python(self) -> str:
        """`command`, quoted for a shell."""
        return shlex.join(self.command)

    @property
    def pid(self) -> int | None:
        """Its process id; None if another server has forked it."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the server, and with it every worker that is left."""
        self._control.close()
        if self._process is not None:
            self._process.terminate()  # which only a server that is still importing acts on
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _options() -> list[str]:
    """Of the interpreter, as this process has it: without -P, files of the working directory hide the library's."""
    return ["-P"] if sys.flags.safe_path else []


def _branch(template: str, listener: socket.socket, environment: Mapping[str, str]) -> socket.socket | None:
    """Have ``template`` fork a server; returns the control socket, or None if that is not possible."""
    if not template:
        return None
    return shim.ask(template, {"driver": os.getpid(), "environment": dict(environment)}, [listener.fileno()])
