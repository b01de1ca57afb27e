"""Stacks of real processes: running, blocked with the GIL held, stopped, deaf, never enabled, gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlinf_lite.cluster import stacks

PY_SPY = shutil.which("py-spy", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
needs_py_spy = pytest.mark.skipif(PY_SPY is None, reason="py-spy is not installed")
SPIN = """
def spins():
    while True:
        pass
"""


class Starter:
    """Starts Python processes; the test continues when they have nothing left to do but the last call."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def plain(self, setup: str, call: str) -> stacks.Process:
        code = f"from rlinf_lite.cluster import stacks\n{setup}\nprint(stacks.me().created, flush=True)\n{call}\n"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout is not None
        started = stacks.Process(pid=process.pid, created=float(process.stdout.readline()))
        time.sleep(0.2)  # from the print into the call
        return started

    def enabled(self, setup: str = SPIN, call: str = "spins()") -> stacks.Process:
        return self.plain(f"stacks.enable()\n{setup}", call)

    def ended(self) -> stacks.Process:
        process = self.plain("", "")
        wait_for(lambda: state_of(process) == "Z")
        return process


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for process in starter.started:
        process.kill()
        process.communicate()


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fields(pid: int) -> list[str]:
    """Of the kernel's line on a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state_of(process: stacks.Process) -> str:
    return fields(process.pid)[0]


def stop(process: stacks.Process) -> stacks.Process:
    os.kill(process.pid, signal.SIGSTOP)
    wait_for(lambda: state_of(process) == "T")
    return process


def test_all_threads_of_a_running_process_which_continues(start):
    beside = "import threading, time\ndef waits_beside(): time.sleep(60)\n"
    process = start.enabled(SPIN + beside + "threading.Thread(target=waits_beside, daemon=True).start()")
    (first,), (second,) = stacks.collect([process]), stacks.collect([process])
    for stack in (first, second):
        assert (stack.pid, stack.state) == (process.pid, "running")
        assert "most recent call first" in stack.text
        # each signal's dump alone, and whole: the main thread comes last
        assert stack.text.count("in spins") == stack.text.count("in waits_beside") == 1
    assert state_of(process) in "RS"


@pytest.mark.parametrize(
    ("setup", "state"),
    [
        ("import ctypes\ndef holds():\n    while True: ctypes.PyDLL(None).sleep(60)", "sleeping"),
        ("import re\ndef holds(): re.match('(a*)*b', 'a' * 60)", "running"),
    ],
)
def test_a_process_that_holds_the_gil_in_a_call_to_c(start, setup, state):
    (stack,) = stacks.collect([start.enabled(setup, "holds()")])
    assert stack.state == state
    assert "most recent call first" in stack.text and "in holds" in stack.text


def test_a_stopped_process_shows_where_it_stood_and_is_woken(start):
    process = stop(start.enabled())
    (stack,) = stacks.collect([process])
    assert stack.state == "stopped"
    assert "most recent call first" in stack.text and "in spins" in stack.text
    assert state_of(process) != "T"


def test_a_stopped_process_stays_stopped_unless_it_may_be_woken(start):
    process = stop(start.enabled())
    (stack,) = stacks.collect([process], wake=False)
    assert stack.state == "stopped"
    assert ("spins (<string>" if PY_SPY else "no stacks") in stack.text
    assert state_of(process) == "T"


@needs_py_spy
def test_one_that_never_enabled_is_read_from_outside_and_not_harmed(start):
    process = start.plain("import time\ndef never_enabled(): time.sleep(60)", "never_enabled()")
    (stack,) = stacks.collect([process])
    assert "never_enabled (<string>" in stack.text
    assert state_of(process) == "S"


@needs_py_spy
def test_a_stopped_one_that_never_enabled_is_not_woken(start):
    process = stop(start.plain(SPIN, "spins()"))
    (stack,) = stacks.collect([process])
    assert stack.state == "stopped"
    assert "spins (<string>" in stack.text
    assert state_of(process) == "T"


@needs_py_spy
def test_one_that_does_not_answer_is_read_from_outside(start):
    deaf = "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
    process = start.enabled(deaf + "def is_deaf(): time.sleep(60)", "is_deaf()")
    began = time.monotonic()
    (stack,) = stacks.collect([process], seconds=1.0)
    assert time.monotonic() - began >= 1.0
    assert "is_deaf (<string>" in stack.text


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (None, "py-spy is not installed"),
        ("echo 'Permission Denied' >&2; exit 1", "py-spy failed: Permission Denied"),
        ("exec sleep 60", "py-spy took more than 1 s"),
    ],
)
def test_without_any_stack_it_says_why_and_where_the_kernel_has_it(start, monkeypatch, tmp_path, script, says):
    process = start.plain("import time", "time.sleep(60)")
    monkeypatch.setattr(stacks, "_OUTSIDE_SECONDS", 1.0)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}:{os.environ['PATH']}")
    if script is not None:
        (tmp_path / "py-spy").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "py-spy").chmod(0o755)
    (stack,) = stacks.collect([process])
    assert stack.text.startswith(f"no stacks: process {process.pid} does not write them; {says}; it is sleeping, in")
    assert "\n" not in stack.text


def test_many_at_once_in_their_order_with_one_that_is_gone(start):
    one, gone, other = (
        start.enabled(),
        start.ended(),
        start.enabled("import time\ndef waits(): time.sleep(60)", "waits()"),
    )
    found = stacks.collect([one, gone, other])
    assert [stack.pid for stack in found] == [one.pid, gone.pid, other.pid]
    assert "in spins" in found[0].text
    assert (found[1].state, found[1].text) == ("gone", f"process {gone.pid} is gone")
    assert "in waits" in found[2].text


def test_signals_of_a_scheduler_do_not_end_it_and_leave_no_file(start, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start.enabled("stacks.enable()" + SPIN)  # twice is as good as once
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        os.kill(process.pid, number)
        time.sleep(0.3)
        assert state_of(process) in "RS"
    (stack,) = stacks.collect([process])
    assert stack.text.count("in spins") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_is_not_taken_for_its_parent(start):
    parent = start.enabled("import os, time\ndef here(): time.sleep(60)", "os.fork()\nhere()")
    pid = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text())
    child = stacks.Process(pid=pid, created=float(fields(pid)[19]))
    try:
        (stack,) = stacks.collect([child])
    finally:
        stacks.end([child])
    assert stack.state == "sleeping"
    assert ("here (<string>" if PY_SPY else "does not write them") in stack.text


def test_end_also_ends_stopped_ones_and_minds_no_gone_ones(start):
    running, stopped, gone = start.enabled(), stop(start.enabled()), start.ended()
    missing = stacks.Process(pid=int(Path("/proc/sys/kernel/pid_max").read_text()) + 1, created=1.0)
    stacks.end([gone, missing, stopped, running])
    wait_for(lambda: state_of(running) == state_of(stopped) == "Z")


def test_a_pid_that_was_given_to_another_process_is_left_alone(start):
    process = start.enabled()
    earlier = replace(process, created=process.created - 1)
    (stack,) = stacks.collect([earlier])
    stacks.end([earlier])
    time.sleep(0.3)
    assert stack.state == "gone"
    assert state_of(process) in "RS"
    stacks.end([process])
    wait_for(lambda: state_of(process) == "Z")
