"""A verifier behind a pipe: the parent's end. Never imports the verifier; may be used from any thread.

math-verify guards itself with SIGALRM, which works on the main thread only, and unguarded it can hold the GIL for
ever; reasoning-gym does not guard itself at all. So they run in a child process that the kernel ends when one check has
used up its CPU time; a new one follows.
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
"""A check is given up by CPU time, which a busy machine does not change; wall time is for a child that stands still."""


class VerifierError(RuntimeError):
    """One check has no verdict because of its texts (too large, too slow, fatal to the child): they count as wrong."""


class VerifierLost(RuntimeError):
    """One check has no verdict, and not because of its texts: the response cannot be graded."""


class VerifierStartError(UserError, RuntimeError):
    """The verifier cannot run at all: nothing can be scored, and the run must not go on."""


class Verifier:
    """A child process that answers one request at a time, started at the first.

    Args:
        timeout: CPU seconds for one request.
        subject: what the child does: ``math-verify`` or ``reasoning-gym``.
    """

    def __init__(self, timeout: float, subject: str = "math-verify") -> None:
        self._timeout, self._subject = timeout, subject
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the running child, None when there is none."""
        return self._child.process.pid if self._child else None

    def check(self, reference: str, answer: str, up_to_factor: bool = False) -> bool:
        """Whether two expressions in normal form are equal; ``up_to_factor``: or differ by a constant factor.

        Raises:
            VerifierError: the check ran out of CPU time or failed, or the child crashed in it twice.
            VerifierLost: the child was killed, or stood still, in it twice.
            VerifierStartError: no child could be started.
        """
        return bool(self.ask({"reference": reference, "answer": answer, "up_to_factor": up_to_factor})["correct"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's reply; raises as `check`."""
        with self._lock:
            try:
                reply = self._ask(request)
            except _ChildLost:
                # Killed from outside (out of memory, an operator): the sample is innocent until it happens
                # again, so that an accident does not change a reward.
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
            # On an interrupt too: a reply left in the pipe would be taken for the next check's.
            self._stop()
            raise

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
"""Signals that a process gets for what it did itself; others are sent by somebody else (out of memory, an operator)."""


class _ChildLost(Exception):
    """The child died, or does not answer: it has to be replaced."""

    def __init__(self, reason: str, *, crashed: bool = False) -> None:
        super().__init__(reason)
        self.crashed = crashed


class _Child:
    """One process: JSON lines in, JSON lines out. It ends by itself when its input does, that is with its parent."""

    def __init__(self, cpu_seconds: float, subject: str) -> None:
        self._cpu_seconds, self._subject = cpu_seconds, subject
        self.process = subprocess.Popen(
            # -P: by its path alone, the directory of the script must not shadow anybody's modules.
            [sys.executable, "-P", str(_CHILD), str(cpu_seconds), subject],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy orders some of its work by hash; one fixed seed, and every child says the same.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            # A session of its own: Ctrl-C is the parent's to handle.
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self._greet()

    def ask(self, request: dict[str, Any], wall_seconds: float) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            VerifierError: the check used up its CPU time.
            _ChildLost: the child died of anything else, or was silent for ``wall_seconds``.
        """
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._lost() from None
        return self._read(wall_seconds)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._replies.close()
        # A request that the dead child never read may still be in the buffer.
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()

    def _greet(self) -> None:
        try:
            greeting = self._read(_START_SECONDS)
        except _ChildLost as error:
            self.stop()
            raise VerifierStartError(f"{self._subject} did not start: {error}") from None
        if "error" in greeting:
            self.stop()
            raise VerifierStartError(f"{self._subject} did not start: {greeting['error']}")

    def _read(self, wall_seconds: float) -> dict[str, Any]:
        # poll, not select: a large process has file descriptors above 1023.
        poller = select.poll()
        poller.register(self._replies, select.POLLIN)
        line, deadline = b"", time.monotonic() + wall_seconds
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _ChildLost(f"silent for {wall_seconds:g} s")
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
