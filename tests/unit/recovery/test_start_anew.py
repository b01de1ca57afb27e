"""A driver that becomes a new one: no signal is lost by that. Real signals, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from rlinf_lite import launch as module
from rlinf_lite.cluster import own_ray
from rlinf_lite.cluster.errors import RayLost
from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME
from rlinf_lite.recovery.restarts import GaveUp, RestartBudget
from rlinf_lite.runner.interruption import Interruption, on_signals
from rlinf_lite.runner.signals import STOP_SIGNALS, become

BECOME = """
import os, signal, sys, threading, time
from rlinf_lite.runner.interruption import Interruption, on_signals
from rlinf_lite.runner.signals import become, end_at_once

if sys.argv[1] == "new":
    if "launch" in sys.argv:
        stop = Interruption(30.0)
        with on_signals(stop):
            print(stop.reason)
    else:
        end_at_once()
        print("nobody asked")
    sys.exit(0)

others, number = int(sys.argv[1]), int(sys.argv[2])
for _ in range(others):  # as Ray's: they do not block a signal
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

def checked():
    if number:
        os.kill(os.getpid(), number)
        time.sleep(0.3)  # for the handler, in another thread
    return False  # as if it had come just after the look

command = [sys.executable, *sys.orig_argv[1:3], "new", *sys.argv[3:]]
with on_signals(Interruption(30.0)):
    become(sys.executable, command, {"RLINF_LITE_TEST": "handed on"}, checked)
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BECOME, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, EXIT_OUT_OF_TIME, "SIGTERM"), (signal.SIGINT, EXIT_INTERRUPTED, "Ctrl-C")],
)
def test_a_signal_in_the_last_moment_reaches_the_new_program(others, number, code, name):
    done = run(others, int(number))
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(f"{name}: nothing is under way\n")


def test_it_reaches_one_that_takes_signals_later():
    done = run(3, int(signal.SIGUSR1), "launch")
    assert (done.returncode, done.stdout) == (0, "SIGUSR1\n")


def test_without_a_signal_the_new_program_goes_on():
    assert (run(3, 0).stdout, run(3, 0, "launch").stdout) == ("nobody asked\n", "None\n")


def test_a_signal_that_was_noted_keeps_the_program(capfd):
    opened, mask = os.listdir("/proc/self/fd"), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stop = Interruption(30.0)
    with on_signals(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        before = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        become("/nowhere", [], {}, lambda: stop.reason)
        assert signal.set_wakeup_fd(before, warn_on_full_buffer=False) == before
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        with pytest.raises(FileNotFoundError):
            become("/nowhere", ["x"], {}, lambda: None)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert len(os.listdir("/proc/self/fd")) == len(opened) and "RLINF_LITE_SIGNALS" not in os.environ


class Supervisor:
    """Stands where the run's does; its look on the disk takes as long as it takes a signal to come."""

    def admit_ray_lost(self, lost: RayLost) -> None:
        """Admitted."""

    @property
    def has_saved(self) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True


def driver(stop: Interruption, **options: object) -> module._Driver:
    budget = RestartBudget(max_restarts=3, window_seconds=600.0)
    made = {"config": None, "directories": None, "request": None, "stack": ExitStack(), "given_up": threading.Event()}
    return module._Driver(stop=stop, budget=budget, started=12.5, **{**made, **options})


@pytest.fixture
def lives(monkeypatch):
    """What a new driver is started with, in place of the start."""
    started = []
    monkeypatch.setattr(module, "become", lambda *arguments, unless: started.append((arguments, unless())))
    monkeypatch.delenv(own_ray._VARIABLE, raising=False)
    return started


def test_a_signal_while_the_disk_is_looked_at_is_acted_on(lives, capfd):
    own_ray.note_start()
    stop = Interruption(30.0)
    with on_signals(stop):
        driver(stop, supervisor=Supervisor(), session=object()).start_anew(RayLost("the raylet is gone"))
    assert stop.reason == "SIGTERM" and not lives


def test_a_ray_that_did_not_start_and_left_nothing_is_started_again(lives, capfd):
    own_ray.note_start()
    assert own_ray.roots() == []
    stop = Interruption(30.0)
    trying = driver(stop)
    for number in (1, 2):
        trying.start_anew(RayLost("Ray did not start on this machine: timed out"))
        (program, arguments, environment), stopped = lives.pop()
        assert (program, arguments[0], stopped) == (sys.executable, sys.executable, False)
        assert environment["RLINF_LITE_STARTED"] == "12.5" and "RLINF_LITE_REJOIN" not in environment
        assert len(RestartBudget.from_json(environment["RLINF_LITE_RESTARTS"]).restarts) == number
    with pytest.raises(GaveUp, match="3 times in a row"):
        trying.start_anew(RayLost("Ray did not start on this machine: timed out"))


def test_a_cluster_that_was_not_joined_yet_is_not_replaced_by_another(lives):
    lost = RayLost("it does not answer")
    with pytest.raises(RayLost, match="it does not answer"):
        driver(Interruption(30.0)).start_anew(lost)
    assert not lives and set(STOP_SIGNALS).isdisjoint(signal.pthread_sigmask(signal.SIG_BLOCK, []))
