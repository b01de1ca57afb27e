"""The parent process of a run: starts the driver, forwards signals to it, and starts a new one when it dies.

It imports nothing heavy and does nothing else, so it can act on a signal at any time.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TextIO

from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME
from rlinf_lite.recovery.handover import SOCKET_VARIABLE, Handover, Report
from rlinf_lite.recovery.restarts import GaveUp, RestartBudget, budget_for
from rlinf_lite.runner.signals import SAVE_SIGNAL, STOP_SIGNALS

SAME_REQUEST_SECONDS = 0.1
"""Signals so close are one stop request: `timeout` and shells send theirs to the process and to its group."""
_STOP_CODES = (EXIT_OUT_OF_TIME, EXIT_INTERRUPTED)
START_SECONDS = 1.0
"""How long a driver that has nothing to save may take to end after a stop request."""
_MAX_RESTARTS, _RESTART_WINDOW = 10, 3600.0
"""The defaults of ``runner.max_restarts`` and ``restart_window``."""


def driver_command(command: Sequence[str], num_arguments: int) -> list[str]:
    """The command of the driver, with the interpreter's options and the arguments of this process.

    Args:
        command: how this process was started, ``sys.orig_argv``.
        num_arguments: the number of run arguments at its end.
    """
    end = len(command) - num_arguments
    options = command[1 : end - 1]  # then comes the module after -m, or a script's path
    module = [] if options and options[-1].endswith("m") and options[-1].startswith("-") else ["-m"]
    return [sys.executable, *options, *module, "rlinf_lite.driver", *command[end:]]


def max_restarts_of(command: Sequence[str]) -> int:
    """``runner.max_restarts`` of a driver that dies before it has read its config.

    As the command line sets it, or else the default: what a YAML file says, only a driver can read.
    """
    for argument in reversed(command):
        key, _, value = argument.partition("=")
        if key.lstrip("+") == "runner.max_restarts" and value.isdecimal():
            return int(value)
    return _MAX_RESTARTS


@dataclass(frozen=True, kw_only=True, slots=True)
class _StopRequest:
    """The first stop signal; it decides the exit code."""

    reason: str
    code: int
    at: float


class Driver:
    """One driver process and this end of its socket."""

    def __init__(self, command: list[str], handover: Handover) -> None:
        self.report = Report()
        self._handover = handover
        self.exit_code: int | None = None
        """Once it has ended; negative: by this signal."""
        self.is_killed = False
        self._unread = b""
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.connection.sendall(handover.to_line())
            theirs.set_inheritable(True)
            environment = {**os.environ, SOCKET_VARIABLE: str(theirs.fileno())}
            self.pid = os.posix_spawn(command[0], command, environment, setsigdef=[signal.SIGPIPE], setsigmask=[])

    def read(self) -> None:
        """Take in what the driver has reported."""
        with suppress(BlockingIOError, ConnectionResetError):
            while part := self.connection.recv(65536, socket.MSG_DONTWAIT):
                *lines, self._unread = (self._unread + part).split(b"\n")
                for line in lines:
                    self.report.update(line)

    def reap(self) -> None:
        """Notice the driver's end; and let go of dead processes that its Ray has left to us."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == self.pid:
                    self.exit_code = os.waitstatus_to_exitcode(ended[1])

    def send(self, number: int) -> None:
        if self.exit_code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.is_killed = True
        self.send(signal.SIGKILL)

    def close(self) -> None:
        """Take in the last reports, and end what the driver's own Ray has left behind."""
        self.read()
        self.connection.close()
        joined = self.report.address or self._handover.address
        if self.report.exit_code != 0 and not joined:
            from rlinf_lite.cluster import own_ray  # imports psutil, which a run that ends well does not need

            own_ray.end_of(self.pid)


class Parent:
    """Runs a command's drivers, one after the other, until one ends in order or restarts are used up."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._handover = Handover(started=time.monotonic())
        self._step = 0
        self._stop: _StopRequest | None = None
        self._save_is_wanted = False

    def run(self) -> int:
        """Returns the exit code of the run."""
        _adopt_orphans()
        with _signals() as signals:
            while True:
                driver = Driver(self._command, self._handover)
                self._attend(driver, signals)
                driver.close()
                self._step = driver.report.step if driver.report.step is not None else self._step
                if (code := self._end(driver)) is not None:
                    return code

    # -- while a driver runs

    def _attend(self, driver: Driver, signals: int) -> None:
        """Forward signals and read reports until the driver has ended."""
        while driver.exit_code is None:
            select.select([signals, driver.connection.fileno()], [], [], self._patience(driver))
            driver.read()
            for number in _read_signals(signals):
                self._on_signal(number, driver)
            if self._patience(driver) == 0.0:
                driver.kill()
            if self._save_is_wanted and driver.report.is_built:
                self._save_is_wanted = False
                driver.send(SAVE_SIGNAL)
            driver.reap()

    def _on_signal(self, number: int, driver: Driver) -> None:
        if number == SAVE_SIGNAL:
            self._save_is_wanted = True
        elif number in STOP_SIGNALS:
            now = time.monotonic()
            if self._stop is None:
                reason, code = STOP_SIGNALS[number]
                self._stop = _StopRequest(reason=reason, code=code, at=now)
                driver.send(number)
            elif now - self._stop.at > SAME_REQUEST_SECONDS:
                driver.kill()

    def _patience(self, driver: Driver) -> float | None:
        """Seconds until a driver that was asked to stop in its start is killed; None: it is waited for."""
        if self._stop is None or driver.report.is_built or driver.is_killed:
            return None
        return max(0.0, self._stop.at + START_SECONDS - time.monotonic())

    # -- when it has ended

    def _end(self, driver: Driver) -> int | None:
        """The run's exit code, or None to start the driver again."""
        report, code = driver.report, driver.exit_code
        assert code is not None
        if report.exit_code is not None:
            return report.exit_code
        if self._stop is not None:
            _print(f"{self._stop.reason}: ended without waiting", sys.stderr)
            return self._stop.code
        if code in _STOP_CODES:
            return code  # a stop signal to the driver alone, before its start
        if code > 0 and report.budget is None:
            return code  # Python could not even start it, and has said why
        try:
            self._admit(report, f"Ray was lost: {report.ray_lost}" if report.ray_lost else _describe(code))
        except GaveUp as error:
            _print(f"{error.lines()}\n{error.advice}", sys.stderr)
            return error.exit_code
        return None

    def _admit(self, report: Report, text: str) -> None:
        """Spend a restart, and prepare the handover to the next driver. Raises `GaveUp`."""
        _print("\n".join(f"!! {line}" for line in text.splitlines()))
        budget = budget_for(max_restarts_of(self._command), _RESTART_WINDOW, None)
        if (spent := report.budget or self._handover.budget) is not None:
            budget = RestartBudget.from_json(spent)
        number = budget.admit(step=self._step, cause="Ray was lost" if report.ray_lost else text, death=True)
        restart = f"(restart {number} of {budget.max_restarts})"
        _print(f"   starting the driver again, with {self._step} steps completed {restart}")
        self._handover = replace(
            self._handover,
            budget=budget.to_json(),
            address=report.address or self._handover.address,
            was_built=self._handover.was_built or report.is_built,
            restart=text,
        )


def _describe(code: int) -> str:
    if code < 0:
        return f"the driver was killed by {signal.Signals(-code).name}"
    return f"the driver ended with exit code {code} in the middle of the run"


def _print(text: str, stream: TextIO | None = None) -> None:
    with suppress(OSError):  # nobody reads it any more
        print(text, file=stream or sys.stdout, flush=True)


def _adopt_orphans() -> None:
    """Become the parent of what a killed driver leaves behind, so that it can be found."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


@contextmanager
def _signals() -> Iterator[int]:
    """A pipe to which the number of every signal is written that this process acts on.

    Signals that are ignored stay ignored: a job in the background must not end by the Ctrl-C of another.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (*STOP_SIGNALS, SAVE_SIGNAL):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    signal.signal(signal.SIGCHLD, _note)  # even if it is ignored: the kernel would throw exit codes away
    try:
        yield read
    finally:
        signal.set_wakeup_fd(-1)
        os.close(read)
        os.close(write)


def _note(number: int, frame: FrameType | None) -> None:
    """A handler: Python has written the number to the pipe."""


def _read_signals(pipe: int) -> bytes:
    with suppress(BlockingIOError):
        return os.read(pipe, 4096)
    return b""
