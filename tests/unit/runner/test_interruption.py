"""Stop requests: what is given up when, and real signals in processes of their own."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlinf_lite.errors import EXIT_OUT_OF_TIME
from rlinf_lite.runner.interruption import Interrupted, Interruption, on_signals
from rlinf_lite.runner.signals import STOP_SIGNALS


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def interruption(clock) -> Interruption:
    return Interruption(30.0, clock)


def test_nobody_asked(interruption):
    assert (interruption.reason, interruption.code, interruption.seconds_left) == (None, 0, math.inf)
    with interruption.immediate(), interruption.abandonable():
        interruption.check()


def test_the_first_request_counts(interruption, clock, capfd):
    interruption.ask("node 10.0.0.2 is being drained", 75)
    clock.now += 10
    interruption.ask("Ctrl-C", 130)
    assert (interruption.reason, interruption.code) == ("node 10.0.0.2 is being drained", 75)
    assert interruption.seconds_left == 20.0
    told = capfd.readouterr().err
    assert told.startswith("node 10.0.0.2 is being drained: stopping: ") and "within 30 s" in told
    assert told.count("\n") == 1 and "a second signal ends it at once" in told


def test_a_phase_is_finished_first_unless_the_grace_is_used_up(interruption, clock):
    interruption.ask("SIGTERM", 75)
    clock.now += 29.9
    interruption.check()
    clock.now += 0.1
    with pytest.raises(Interrupted) as error:
        interruption.check()
    assert (error.value.reason, error.value.code, str(error.value)) == ("SIGTERM", 75, "stopped: SIGTERM")


def test_an_abandonable_phase_is_left_at_once(interruption):
    with pytest.raises(Interrupted), interruption.abandonable():
        interruption.check()
        interruption.ask("SIGTERM", 75)
        interruption.check()
        pytest.fail("check did not raise")
    interruption.check()


def test_an_abandonable_phase_is_left_on_the_way_in_and_out(interruption):
    done = []
    with pytest.raises(Interrupted), interruption.abandonable():
        interruption.ask("SIGTERM", 75)
        done.append("body")
    with pytest.raises(Interrupted), interruption.abandonable():
        done.append("not entered")
    assert done == ["body"]
    interruption.check()


def test_abandonable_may_be_nested(interruption):
    with pytest.raises(Interrupted), interruption.abandonable():
        with interruption.abandonable():
            pass
        interruption.ask("SIGTERM", 75)
        with pytest.raises(Interrupted), interruption.abandonable():
            pass
        interruption.check()  # the outer one is still in force
        pytest.fail("check did not raise")
    interruption.check()


@pytest.mark.parametrize("context", [Interruption.abandonable, Interruption.immediate])
def test_an_error_from_within_passes(interruption, context):
    with pytest.raises(KeyError), context(interruption):
        interruption.ask("SIGTERM", 75)
        raise KeyError
    interruption.check()


def test_interrupted_is_no_error_to_be_handled():
    assert not issubclass(Interrupted, Exception)
    again = pickle.loads(pickle.dumps(Interrupted("SIGTERM", 75)))
    assert (again.reason, again.code) == ("SIGTERM", 75)


def test_immediate_takes_the_exit_of_rays_own_handler_for_the_signal(interruption, capfd):
    with pytest.raises(Interrupted) as error, interruption.immediate():
        sys.exit(signal.SIGTERM)
    assert (error.value.reason, error.value.code, interruption.reason) == ("SIGTERM", EXIT_OUT_OF_TIME, "SIGTERM")
    assert capfd.readouterr().err.startswith("SIGTERM: stopping: there is nothing to save yet (")
    with pytest.raises(SystemExit) as end, Interruption(30.0).immediate():
        sys.exit(2)
    assert end.value.code == 2


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_only_noted(number, interruption):
    reason, code = {
        signal.SIGTERM: ("SIGTERM", 75),
        signal.SIGUSR1: ("SIGUSR1", 75),
        signal.SIGINT: ("Ctrl-C", 130),
    }[number]
    with on_signals(interruption):
        os.kill(os.getpid(), number)
        assert (interruption.reason, interruption.code) == (reason, code)
        interruption.check()
        with pytest.raises(Interrupted, match=reason), interruption.abandonable():
            pytest.fail("entered")


def test_everything_is_restored(interruption):
    def own(number, frame):
        """What was there before."""

    outer = {number: signal.signal(number, own) for number in STOP_SIGNALS}
    try:
        with pytest.raises(KeyError), on_signals(interruption):
            assert all(signal.getsignal(number) not in (own, None) for number in STOP_SIGNALS)
            raise KeyError
        assert all(signal.getsignal(number) is own for number in STOP_SIGNALS)
    finally:
        for number, handler in outer.items():
            signal.signal(number, handler)


def test_install_takes_a_signal_back(interruption):
    with on_signals(interruption):
        ours = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        interruption.install()
        assert signal.getsignal(signal.SIGTERM) == ours
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.reason == "SIGTERM"


def test_what_is_ignored_stays_ignored(interruption):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals(interruption):
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.reason is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_takes_no_signals(interruption):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    seen = []

    def run() -> None:
        with on_signals(interruption):
            interruption.install()
            seen.append({number: signal.getsignal(number) for number in STOP_SIGNALS})

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


PRELUDE = """
import os, signal, sys, threading, time
from rlinf_lite.runner.interruption import Interrupted, Interruption, on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
interruption = Interruption(30.0)
def ready():
    print("ready", flush=True)
"""
WAITS = {
    "event": "threading.Event().wait(30)",
    "loop": "while True: pass",
}


@pytest.fixture
def start():
    """Start Python code and wait until it says that it is ready; ended with the test."""
    processes = []

    def run(code: str, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PRELUDE + code]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **{**pipes, **options}))
        assert processes[-1].stdout.readline() == "ready\n"
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], within: float = 5.0) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=within)
    return process.returncode, errors


COUNT_TO_A_SECOND = """
with on_signals(interruption):
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    ready()
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        interruption.check()
        time.sleep(0.01)
    print(interruption.reason, flush=True)
"""


def test_several_signals_are_one_request(start):
    process = start(COUNT_TO_A_SECOND)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() in ("SIGTERM\n", "SIGUSR1\n")
    assert ended(process)[0] == 0


def test_a_repeated_signal_changes_nothing(start):
    process = start(COUNT_TO_A_SECOND)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.2)
    assert process.stdout.readline() == "SIGTERM\n"
    assert ended(process)[0] == 0


def test_a_drained_node_is_no_first_signal(start):
    process = start(f"interruption.ask('node a is being drained', 75)\n{COUNT_TO_A_SECOND}")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "node a is being drained\n"
    assert ended(process)[0] == 0


@pytest.mark.parametrize("wait", ["event", "loop"])
def test_immediate_is_left_wherever_the_main_thread_is(start, wait):
    code = f"""
with on_signals(interruption):
    try:
        with interruption.immediate():
            ready()
            {WAITS[wait]}
    except Interrupted as error:
        os._exit(error.code + 1)
"""
    process = start(code)
    process.send_signal(signal.SIGTERM)
    code, errors = ended(process)
    assert code == EXIT_OUT_OF_TIME + 1 and "SIGTERM: stopping: there is nothing to save yet" in errors


def test_before_the_start_a_signal_ends_the_process(start):
    process = start("from rlinf_lite.runner.signals import end_at_once\nend_at_once()\nready()\ntime.sleep(30)")
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == (EXIT_OUT_OF_TIME, "SIGUSR1: stopped, there was nothing to save\n")


def test_outside_of_immediate_nothing_is_raised(start):
    process = start("with on_signals(interruption):\n    with interruption.immediate(): pass" + AFTER)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "slept\n"
    assert ended(process)[0] == 0


AFTER = """
    ready()
    time.sleep(1)
    print("slept", flush=True)
"""


def test_a_closed_stderr_does_not_matter(start):
    process = start("os.close(2)\nwith on_signals(interruption):" + AFTER, stderr=None)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "slept\n"
    assert ended(process)[0] == 0
