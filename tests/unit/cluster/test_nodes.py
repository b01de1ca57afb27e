"""Probes under RayPulse, on ordinary processes and sockets; with Ray: tests/e2e/test_nodes.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from rlinf_lite.cluster.nodes import _answers, _gone, _listener


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


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "[::1]")])
def test_answers_while_somebody_listens(family, host):
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server((host.strip("[]"), 0), family=family) as server:
        address = f"{host}:{server.getsockname()[1]}"
        assert _answers(address)
    assert not _answers(address)
