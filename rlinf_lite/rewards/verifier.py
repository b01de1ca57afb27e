"""Runs a verifier (math-verify or reasoning-gym) in a child process with limits. May be used from any thread.

math-verify limits its time with SIGALRM, which works on the main thread only; without it a check can hold the GIL
forever. reasoning-gym has no limit at all. So they run in a child process: the kernel kills it when a check has used up
its CPU time, and a new child is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rlinf_lite.errors import UserError

_CHILD = Path(__file__).with_name("verifier_child.py")
_START_SECONDS = 300.0
_WALL_FACTOR = 10.0
"""Checks are limited by CPU time, which does not depend on the load of the machine. The wall time limit, this many
times longer, is for a child that hangs without using CPU time."""


class VerifierError(RuntimeError):
    """A check failed because of its texts (too long, too slow, or they crashed the child): the response is wrong."""


class VerifierLost(RuntimeError):
    """A check failed for another reason, such as a killed child: the response cannot be graded."""


class VerifierStartError(UserError, RuntimeError):
    """The verifier cannot start, so nothing can be graded and the run has to stop."""


class Verifier:
    """A child process that handles one request at a time; it is started by the first request.

    Args:
        timeout: CPU seconds per request.
        subject: which verifier the child runs: ``math-verify`` or ``reasoning-gym``.
    """

    def __init__(self, timeout: float, subject: str = "math-verify") -> None:
        self._timeout, self._subject = timeout, subject
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child, None if there is none."""
        return self._child.process.pid if self._child else None

    def check(self, reference: str, answer: str, up_to_factor: bool = False) -> bool:
        """Whether two expressions in normal form are equal or, with ``up_to_factor``, differ by a constant factor.

        Raises:
            VerifierError: the check ran out of CPU time or failed, or it crashed the child twice.
            VerifierLost: the child was killed, or hung, twice during the check.
            VerifierStartError: no child could be started.
        """
        return bool(self.ask({"reference": reference, "answer": answer, "up_to_factor": up_to_factor})["correct"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the child and return its reply. Raises the same errors as `check`."""
        with self._lock:
            try:
                reply = self._ask(request)
            except _ChildLost:
                # Perhaps killed from outside (out of memory, an operator). Try again, so that an accident does not
                # change a reward.
                reply = self._ask_again(request)
        if "error" in reply:
            raise VerifierError(f"{self._subject} failed: {reply['error']}")
        return reply

    def close(self) -> None:
        """Stop the child, if there is one."""
        with self._lock:
            self._stop()

    def _ask_again(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._ask(request)
        except _ChildLost as lost:
            error = VerifierError if lost.crashed else VerifierLost
            raise error(f"{self._subject} gave no answer twice: {lost}") from None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._child = _Child(self._timeout, self._subject)
        try:
            return self._child.ask(request, self._timeout * _WALL_FACTOR)
        except BaseException:
            # On an interrupt too: a reply left in the pipe would be mistaken for that of the next request.
            self._stop()
            raise

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
"""Signals for errors of the process itself. Others come from outside (the kernel out of memory, an operator)."""


class _ChildLost(Exception):
    """The child died or does not answer, and has to be replaced."""

    def __init__(self, reason: str, *, crashed: bool = False) -> None:
        super().__init__(reason)
        self.crashed = crashed


class _Child:
    """A child process that reads and writes JSON lines. It exits at the end of its input, that is with its parent."""

    def __init__(self, cpu_seconds: float, subject: str) -> None:
        self._cpu_seconds, self._subject = cpu_seconds, subject
        self.process = subprocess.Popen(
            # -P: the directory of the script must not shadow other modules.
            [sys.executable, "-P", str(_CHILD), str(cpu_seconds), subject],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy orders some of its work by hash: with a fixed seed every child gives the same verdicts.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            # In its own session, so that Ctrl-C only reaches the parent.
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self._wait_until_ready()

    def ask(self, request: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            VerifierError: the request used up its CPU time.
            _ChildLost: the child died for another reason, or did not answer for ``wall_seconds``.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._lost() from None
        return self._read(wall_seconds)

    def stop(self) -> None:
        """Kill the process and wait for it."""
        self.process.kill()
        self.process.wait()
        self._replies.close()
        # The buffer may still hold a request that the child never read.
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def _wait_until_ready(self) -> None:
        try:
            first = self._read(_START_SECONDS)
        except _ChildLost as error:
            self.stop()
            raise VerifierStartError(f"{self._subject} did not start: {error}") from None
        if "error" in first:
            self.stop()
            raise VerifierStartError(f"{self._subject} did not start: {first['error']}")

    def _read(self, wall_seconds: float) -> dict[str, Any]:
        # poll and not select: a large process may have file descriptors above 1023.
        poller = select.poll()
        poller.register(self._replies, select.POLLIN)
        line, deadline = b"", time.monotonic() + wall_seconds
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _ChildLost(f"no answer for {wall_seconds:g} s")
            piece = os.read(self._replies.fileno(), 65536)
            if not piece:
                raise self._lost()
            line += piece
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _lost(self) -> Exception:
        code = self.process.wait()
        if code == -signal.SIGPROF:
            return VerifierError(f"{self._subject} took more than {self._cpu_seconds:g} s of CPU time")
        return _ChildLost(f"exit status {code}", crashed=code > 0 or -code in _CRASHES)
