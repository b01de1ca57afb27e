"""Stop requests, from a signal or a drained node: work in progress is finished or given up, and then saved."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from rlinf_lite.runner.signals import STOP_SIGNALS


class Interrupted(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt, nothing that handles errors should swallow it."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.reason, self.code = reason, code

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _StopRequest:
    reason: str
    code: int
    deadline: float


class Interruption:
    """Whether the run was asked to stop, and what may be given up for it.

    Outside of `abandonable` and `immediate` a stop request is only noted: a phase that would have to be repeated is
    finished first, within the grace.
    """

    def __init__(self, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_seconds, self._clock = grace_seconds, clock
        # A list, because its append is atomic: a signal may come in the middle of `ask`, and the first request counts.
        self._requests: list[_StopRequest] = []
        self._abandonable = self._immediate = 0

    @property
    def reason(self) -> str | None:
        """Who asked: ``SIGTERM``, ``Ctrl-C``, ``node 10.0.0.2 is being drained``; None if nobody did."""
        return self._requests[0].reason if self._requests else None

    @property
    def code(self) -> int:
        """The exit code; 0 if nobody asked."""
        return self._requests[0].code if self._requests else 0

    @property
    def seconds_left(self) -> float:
        """What is left of the grace, negative when it is used up; infinite if nobody asked."""
        return self._requests[0].deadline - self._clock() if self._requests else math.inf

    def ask(self, reason: str, code: int) -> None:
        """Note a stop request; the first counts. Takes no lock: signal handlers, threads and the loop call it."""
        if self._requests:
            return
        request = _StopRequest(reason=reason, code=code, deadline=self._clock() + self._grace_seconds)
        self._requests.append(request)
        if self._requests[0] is request:
            self._announce(request)

    def check(self) -> None:
        """Called wherever the run may be left.

        Raises:
            Interrupted: there is a stop request, and work in progress may be given up, or the grace is used up.
        """
        if self._requests and (self._abandonable or self._immediate or self.seconds_left <= 0):
            raise self._interrupted()

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Inside, `check` raises as soon as there is a stop request; also on the way in and out. May be nested.

        An error from inside passes unchanged.
        """
        self._abandonable += 1
        try:
            self.check()
            yield
            self.check()
        finally:
            self._abandonable -= 1

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, the first signal raises `Interrupted`, wherever the main thread is; also on the way in and out.

        For the start, where there is nothing to save and libraries may wait for long.
        """
        self._immediate += 1
        try:
            self.check()
            yield
            # Python drops what a handler raises within a destructor or a callback.
            self.check()
        except SystemExit as end:
            # For as long as it runs, ray.init has a handler of its own in place of ours: sys.exit(SIGTERM).
            if end.code != signal.SIGTERM:
                raise
            self.ask(*STOP_SIGNALS[signal.SIGTERM])
            raise self._interrupted() from None
        finally:
            self._immediate -= 1

    def install(self) -> None:
        """Take the signals, inside `on_signals`; again after ray.init, which takes SIGTERM for itself.

        A signal that is ignored stays ignored: a background job of a script must not end by the Ctrl-C that ends the
        script. Does nothing outside of the main thread.
        """
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Only the first signal raises: another must not disturb the clean-up after it."""
        is_first = not self._requests
        self.ask(*STOP_SIGNALS[number])
        if is_first and self._immediate:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(self._requests[0].reason, self._requests[0].code)

    def _announce(self, request: _StopRequest) -> None:
        saved = "work in progress is finished or given up, then saved"
        doing = "there is nothing to save yet" if self._immediate else f"{saved}, within {self._grace_seconds:g} s"
        # Not print: the signal may have come in the middle of one, and its buffer cannot be entered twice.
        with suppress(OSError):
            os.write(2, f"{request.reason}: stopping: {doing} (a second signal ends it at once)\n".encode())


@contextmanager
def on_signals(interruption: Interruption) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask ``interruption`` to stop. Does nothing outside of the main thread.

    Handlers run in the main thread, once it is back from C code. The parent process does not wait for that: it ends
    the driver at a second signal, and soon after the first while the run starts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    interruption.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
