"""Probes under RayPulse, on ordinary processes and sockets; with Ray: tests/e2e/test_nodes.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from rlinf_lite.cluster import pulse
from rlinf_lite.cluster.pulse import _gone, _listener


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(timeout=10)


def _eventually(condition) -> bool:
    deadline = time.monotonic() + 10
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return true


def test_a_killed_child_is_gone_and_reaped(sleeper):
    process = psutil.Process(sleeper.pid)
    assert not _gone(process)
    sleeper.kill()
    assert _eventually(lambda: _gone(process))
    assert not psutil.pid_exists(sleeper.pid)
    assert _gone(process)


def test_a_dead_process_that_its_parent_does_not_reap_is_gone():
    text = "import subprocess, time; child = subprocess.Popen(['true']); print(child.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert _eventually(lambda: child.status() == psutil.STATUS_ZOMBIE)
        assert _gone(child)
    finally:
        parent.kill()
        parent.communicate(timeout=10)


def test_listener_of_a_socket(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        assert _listener(tmp_path / "s") == os.getpid()


class Head(pulse.Head):
    """Counts the connections that it makes."""

    def connections(self, server: socket.socket) -> int:
        server.setblocking(False)
        number = 0
        while True:
            try:
                server.accept()[0].close()
            except BlockingIOError:
                return number
            number += 1


def test_questions_in_a_row_need_one_connection(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}", patience=20.0)
        monkeypatch.setattr(pulse, "_FRESH_SECONDS", 30.0)
        head._answered -= 30.0
        assert [head.lost() for _ in range(3)] == [None] * 3
        assert head.reachable and head.connections(server) == 1
        head._answered -= 30.0
        assert head.lost() is None and head.connections(server) == 1


def test_a_head_that_does_not_answer_is_asked_each_time(monkeypatch):
    monkeypatch.setattr(pulse, "_FRESH_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    head = pulse.Head(address, patience=20.0)
    assert head.lost() is None and not head.reachable
    monkeypatch.setattr(pulse, "_FRESH_SECONDS", 30.0)
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert head.lost() is None and head.reachable
    monkeypatch.setattr(pulse, "_FRESH_SECONDS", 0.0)
    head._answered -= 20.0
    said = head.lost()
    assert said is not None and said.startswith(f"Ray's GCS at {address} has not answered for 20 s")
