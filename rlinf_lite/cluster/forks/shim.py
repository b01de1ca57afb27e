"""Stands for a worker process in Ray's eyes: has a fork server start the worker, and ends when it ends.

    python -S -I shim.py SERVER default_worker.py ARGUMENTS...

Ray starts this in place of Python, or of its own `setup_worker.py`, whose options it drops. Where no fork server
answers, or it refuses, as on another node, this process becomes Python itself. A worker lives as long as its shim: the
server kills it when the connection closes.
Imports the standard library only, and little of it.
"""

import json
import os
import socket
import sys

ACCEPTED = b"+"
_OF_SETUP = ("--serialized-runtime-env-context=", "--language=")
_NAMESPACES = ("pid", "mnt", "net")
_PATIENCE = 45.0
"""Seconds for the server to answer, which may still be importing on a busy machine; one that has died is noticed at
once. Ray gives a worker 60 s to report."""


def listener(server: str) -> socket.socket:
    """The socket where ``server`` is asked: an abstract one, which leaves no file behind."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(f"\0{server}")
    made.listen(128)
    return made


def namespaces() -> list[str]:
    """Which container this process is in: a worker must not be started in another."""
    return [os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES]


def ask(server: str, request: dict[str, object], files: list[int]) -> socket.socket | None:
    """Send a request with open files; returns the connection if it is granted."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(_PATIENCE)
        connection.connect(f"\0{server}")
        data = json.dumps(request | {"in": namespaces()}).encode()
        socket.send_fds(connection, [f"{len(data):08d}".encode()], files)
        connection.sendall(data)
        if connection.recv(1) == ACCEPTED:
            connection.settimeout(None)
            return connection
    except OSError:
        pass
    connection.close()
    return None


def run_forked(server: str, argv: list[str]) -> int | None:
    """Run Python with ``argv``, forked from ``server``; returns its exit code, or None if that is not possible."""
    request: dict[str, object] = {"argv": argv, "environment": dict(os.environ), "directory": os.getcwd()}
    connection = ask(server, request, [0, 1, 2])
    if connection is None:
        return None
    for number in (1, 2):  # the worker has its own
        os.close(number)
    code = connection.recv(1)
    return code[0] if code else 1


if __name__ == "__main__":
    program = [word for word in sys.argv[2:] if not word.startswith(_OF_SETUP)]
    exit_code = run_forked(sys.argv[1], program)
    if exit_code is None:
        os.execv(sys.executable, [sys.executable, *program])
    os._exit(exit_code)
