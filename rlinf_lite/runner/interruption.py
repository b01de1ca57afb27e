"""Being asked to stop: by a signal, a drained node, Ctrl-C. What is under way is finished or given up, then saved."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from rlinf_lite.runner.signals import STOP_SIGNALS, end, handed_over

SAME_WISH_SECONDS = 0.1
"""Signals so close are one wish: `timeout` and shells send theirs to the process and to its group."""
_START_SECONDS = 1.0
"""How long the main thread may take to leave the start-up: a library may be in C code, where no handler runs."""


class Interrupted(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt, nothing that handles errors should swallow it."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.reason, self.code = reason, code

    def __str__(self) -> str:
        return f"stopped: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wish:
    reason: str
    code: int
    deadline: float


class Interruption:
    """Whether somebody asked the run to stop, and what may be given up for it.

    Outside of `abandonable` and `immediate` the wish is only noted: a phase that would have to be done again is
    finished first, within the grace.
    """

    def __init__(self, grace_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_seconds, self._clock = grace_seconds, clock
        # A list, since its append is one act: a signal may come in the middle of `ask`, and the first wish counts.
        self._wishes: list[_Wish] = []
        self._abandonable = self._immediate = 0

    @property
    def reason(self) -> str | None:
        """Who asked: ``SIGTERM``, ``Ctrl-C``, ``node 10.0.0.2 is being drained``; None: nobody did."""
        return self._wishes[0].reason if self._wishes else None

    @property
    def code(self) -> int:
        """The exit code; 0 when nobody asked."""
        return self._wishes[0].code if self._wishes else 0

    @property
    def seconds_left(self) -> float:
        """What is left of the grace, below 0 when it is used up; without end when nobody asked."""
        return self._wishes[0].deadline - self._clock() if self._wishes else math.inf

    def ask(self, reason: str, code: int) -> None:
        """Note the wish; the first counts. Takes no lock: it is called from signal handlers, threads, and the loop."""
        if self._wishes:
            return
        wish = _Wish(reason=reason, code=code, deadline=self._clock() + self._grace_seconds)
        self._wishes.append(wish)
        if self._wishes[0] is wish:
            self._tell(wish)

    def check(self) -> None:
        """Where the run may be left.

        Raises:
            Interrupted: somebody asked, and what is under way may be given up, or the grace is used up.
        """
        if self._wishes and (self._abandonable or self._immediate or self.seconds_left <= 0):
            raise self._interrupted()

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Within: `check` raises as soon as somebody asked; also on the way in and out. May be nested.

        An error from within passes as it is, asked or not.
        """
        self._abandonable += 1
        try:
            self.check()
            yield
            self.check()
        finally:
            self._abandonable -= 1

    @property
    def is_immediate(self) -> bool:
        """Whether there is nothing to save yet, and nothing to finish."""
        return self._immediate > 0

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within: the signal itself raises `Interrupted`, wherever the main thread is; also on the way in and out.

        For the start, where there is nothing to save and much that waits in other people's code.
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
        """Take the signals, within `on_signals`; again after ray.init, which takes SIGTERM for itself.

        What is ignored stays so: a job in the background of a script must not end by the Ctrl-C that ends the script.
        Does nothing outside of the main thread.
        """
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._note)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `signals.become` blocks them

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.ask(*STOP_SIGNALS[signal.Signals(number)])
        if self._immediate:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(self._wishes[0].reason, self._wishes[0].code)

    def _tell(self, wish: _Wish) -> None:
        saved = "what is under way is finished or given up, then saved"
        doing = "there is nothing to save yet" if self._immediate else f"{saved}, within {self._grace_seconds:g} s"
        # Not print: the signal may have come in the middle of one, and its buffer cannot be entered twice.
        with suppress(OSError):
            os.write(2, f"{wish.reason}: stopping: {doing} (a second signal ends it at once)\n".encode())


@contextmanager
def on_signals(interruption: Interruption) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask ``interruption`` to stop; a second one ends the process at once, and one during
    the start-up after a second.

    Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with _watched(interruption):
        interruption.install()
        for number in handed_over():
            interruption.ask(*STOP_SIGNALS[signal.Signals(number)])
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _watched(interruption: Interruption) -> Iterator[None]:
    """End the process at the second signal, whatever the main thread does; in the start-up soon after the first.

    Handlers run in the main thread, once it is back from C code, and then once for all equal signals that came
    meanwhile. None would run while that code waits for a disk; but each signal is written to the wakeup pipe.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(read, interruption), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        watch.join()
        os.close(read)


def _watch(pipe: int, interruption: Interruption) -> None:
    first: int | None = None
    since, in_start = 0.0, False
    while True:
        patience = max(0.0, since + _START_SECONDS - time.monotonic()) if in_start else None
        if not select.select([pipe], [], [], patience)[0]:
            assert first is not None
            end(STOP_SIGNALS[signal.Signals(first)][1])
        if not (numbers := os.read(pipe, 64)):
            return
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            if first is None:
                first, since, in_start = number, time.monotonic(), interruption.is_immediate
            elif time.monotonic() - since > SAME_WISH_SECONDS:
                end(STOP_SIGNALS[signal.Signals(number)][1])
