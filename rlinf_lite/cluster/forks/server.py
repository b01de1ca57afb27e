"""The fork server: imports what workers import, then forks one whenever a shim asks for it. Linux only.

    python -m rlinf_lite.cluster.forks.server DRIVER LISTENER CONTROL

DRIVER is the process id of the one that it serves, for process lists. Then come descriptors: of the socket where it is
asked, on which requests wait while it imports, and of a socket to the driver, which may name more modules there, a line
of JSON each time. When that one closes, the server kills its workers and ends.

A process that runs threads must not be forked, and one that has used CUDA cannot be. This one only imports; if that has
started threads, as it does with more than one per worker, it ends, and workers are started in the plain way.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlinf_lite.cluster.forks import shim
from rlinf_lite.quick_imports import quick_imports

_PRELOADED = (
    "google.protobuf.json_format",
    "jsonschema",
    "pydantic.v1.dataclasses",
    "requests",
    "rlinf_lite.checkpoint.checkpointer",
    "rlinf_lite.checkpoint.memory.replica",
    "rlinf_lite.models.build",
    "rlinf_lite.rollout.build",
    "rlinf_lite.rollout.builtin",
    "rlinf_lite.selfcheck.engine",
    "rlinf_lite.selfcheck.update",
    "rlinf_lite.training.fsdp.build",
    "rlinf_lite.weights.transport",
    "torch._dynamo",  # by the first DTensor
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
"""With what Ray imports, but not Ray itself, which the driver names when it knows the variables of its Ray."""
_READ_AT_IMPORT = ("OMP_", "MKL_", "CUDA_", "TORCH", "PYTORCH", "PYTHON", "TRANSFORMERS_", "HF_", "LD_", "GLIBC_")
"""How variables begin that are read when a library is imported or a process starts: a worker's must be the server's."""


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


def _read_by_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """The same for Ray, where it is imported: a worker's job and raylet are among them."""
    return {name: value for name, value in environment.items() if name.startswith("RAY_")}


_SETTINGS = _read_at_import(os.environ)
"""Before anything is imported: some libraries set variables."""
_SIGNAL_OF_PARENTS_DEATH, _NAME = 1, 15
"""Options of `prctl`: a name is shown by process lists."""
_HEAD_BYTES = 8
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class _Task:
    """What a new process is to do."""

    run: Callable[[], int]


class _Server:
    """Answers requests until its control socket closes. `serve` also returns in each new process, with its task."""

    def __init__(self, listener: socket.socket, control: socket.socket) -> None:
        self._listener, self._control = listener, control
        self._orders = b""
        """What has come from the driver, up to the part of a line that is not complete."""
        self._settings_of_ray: dict[str, str] | None = None
        """Of the variables, as Ray read them. None: it is not imported."""
        self._workers: dict[int, socket.socket] = {}
        """Process id -> connection to its shim."""

    def serve(self) -> _Task | None:
        """Returns a task in a new process; None in the server, at its end."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        with selectors.DefaultSelector() as self._ready:
            for source in (read, self._control, self._listener):
                self._ready.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in sorted(self._ready.select(), key=self._is_no_order):
                    if key.fileobj is self._control:
                        if orders := self._control.recv(1 << 16):
                            self._obey(orders)
                            continue
                        self._end()
                        return None
                    if key.fileobj is self._listener and self._listener.fileno() >= 0:
                        if (task := self._answer()) is not None:
                            os.close(read)
                            os.close(write)
                            return task
                    elif key.fileobj == read:
                        os.read(read, 4096)
                    elif key.data in self._workers:  # its shim is gone
                        os.kill(key.data, signal.SIGKILL)
                        self._ready.unregister(key.fileobj)
                    self._reap()

    def _is_no_order(self, event: tuple[selectors.SelectorKey, int]) -> bool:
        """A key to sort by: an order is obeyed before requests that came with it, whose workers it is for."""
        return event[0].fileobj is not self._control

    def _obey(self, orders: bytes) -> None:
        *lines, self._orders = (self._orders + orders).split(b"\n")
        for line in lines:
            order = json.loads(line)
            self._import(order["modules"], order["environment"])

    def _import(self, modules: list[str], environment: Mapping[str, str]) -> None:
        """For the workers to come; what cannot be imported is left to them, as is everything once there are threads."""
        os.environ.update(environment)
        if "ray" in modules and self._settings_of_ray is None:  # workers of a second Ray import it by themselves
            self._settings_of_ray = _read_by_ray(os.environ)
        with quick_imports(), warnings.catch_warnings(action="ignore"):
            for module in modules:
                with suppress(ImportError):
                    importlib.import_module(module)
        if _has_threads():
            self._ready.unregister(self._listener)
            self._listener.close()

    def _answer(self) -> _Task | None:
        """Fork a process for a request, if it can be granted. Returns its task in the new process."""
        connection, _ = self._listener.accept()
        files: list[int] = []
        try:
            connection.settimeout(10.0)
            _, user, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            head, files, _, _ = socket.recv_fds(connection, _HEAD_BYTES, 3)
            data = b""
            while len(data) < int(head):
                if not (part := connection.recv(int(head) - len(data))):
                    raise OSError("the request ended early")
                data += part
            request = json.loads(data)
            if (
                user != os.getuid()
                or request["in"] != shim.namespaces()
                or _read_at_import(request["environment"]) != _SETTINGS
                or self._settings_of_ray not in (None, _read_by_ray(request["environment"]))
            ):
                raise OSError("it must be started in another way")
            connection.settimeout(None)
            connection.sendall(shim.ACCEPTED)
        except (OSError, ValueError, KeyError):
            connection.close()
            for file in files:
                os.close(file)
            return None
        pid = os.fork()
        if pid == 0:
            return self._become(request, files, connection)
        for file in files:
            os.close(file)
        if "argv" not in request:
            connection.close()  # the new server's control socket
        else:
            self._workers[pid] = connection
            self._ready.register(connection, selectors.EVENT_READ, pid)
        return None

    def _become(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> _Task:
        """In the new process: let go of all that is the server's."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for held in (self._listener, self._control, *self._workers.values()):
            held.close()
        self._ready.close()
        if "argv" not in request:
            _prctl(_NAME, f"forks-{request['driver']}".encode())
            return _Task(lambda: _serve(socket.socket(fileno=files[0]), connection))
        connection.close()
        for stream, file in enumerate(files):
            os.dup2(file, stream)
            os.close(file)
        os.setpgid(0, 0)  # Ray signals the process group of a worker
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return _Task(lambda: _run(request["argv"]))

    def _reap(self) -> None:
        """Tell shims that their workers have ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if (connection := self._workers.pop(ended[0], None)) is None:
                    continue  # a branch
                with suppress(KeyError):
                    self._ready.unregister(connection)
                with suppress(OSError), connection:
                    connection.sendall(bytes([os.waitstatus_to_exitcode(ended[1]) & 255]))

    def _end(self) -> None:
        for pid in self._workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _prctl(option: int, value: bytes | int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _run(argv: list[str]) -> int:
    """As ``python argv...``."""
    sys.argv = argv
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")
    return 0


def _serve(listener: socket.socket, control: socket.socket) -> int:
    """Be a server, and in each process that it forks, what that is to be."""
    task = _Server(listener, control).serve()
    if task is None:
        os._exit(0)  # the end of an interpreter that has imported so much takes half a second, and nothing needs it
    return task.run()


def main(listener: int, control: int) -> int:
    """Import everything, then serve."""
    driver = socket.socket(fileno=control)
    _prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL)  # there are no workers yet to be ended
    if _is_closed(driver):
        return 0
    with quick_imports():
        for module in _PRELOADED:
            importlib.import_module(module)
    if _has_threads():
        return 0
    _prctl(_SIGNAL_OF_PARENTS_DEATH, 0)
    return _serve(socket.socket(fileno=listener), driver)


def _has_threads() -> bool:
    return len(os.listdir("/proc/self/task")) > 1


def _is_closed(connection: socket.socket) -> bool:
    with suppress(BlockingIOError):
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    return False


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[2:])))
