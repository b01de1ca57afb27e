"""The signals that stop a run, and how the process ends at once. Light: it is imported before everything else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME

STOP_SIGNALS = {
    signal.SIGTERM: ("SIGTERM", EXIT_OUT_OF_TIME),
    signal.SIGUSR1: ("SIGUSR1", EXIT_OUT_OF_TIME),
    signal.SIGINT: ("Ctrl-C", EXIT_INTERRUPTED),
}
"""Reason and exit code of each."""
_HANDED_VARIABLE = "RLINF_LITE_SIGNALS"
"""Environment variable: from which file descriptor `handed_over` reads."""


def end_at_once() -> None:
    """From now on each of the signals ends the process, with the code of a stop: nothing is under way.

    Except while `interruption.on_signals` takes them. What is ignored stays so. One that came while this program
    took another's place counts.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # `become` blocks them
    for handed in handed_over():
        _stop(handed, None)


def become(program: str, arguments: list[str], environment: Mapping[str, str], unless: Callable[[], object]) -> None:
    """Replace this process's program, by ``os.execve``; no signal of these is lost by that.

    To be called by the main thread. One that comes while it is blocked there is taken by another thread (Ray has some
    of C++, which nobody can make block it), whose handler writes it into a pipe that the new program inherits; or it
    stays pending.

    Args:
        arguments: with the program's name.
        environment: what to add to this process's.
        unless: true if one came before, and its handler noted it.

    Returns:
        Only if ``unless`` is true.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    os.set_inheritable(read, True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        if not unless():  # whatever comes from here on is in the pipe, or pending
            os.execve(program, arguments, {**os.environ, **environment, _HANDED_VARIABLE: str(read)})
    finally:
        signal.set_wakeup_fd(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(read)
        os.close(write)


def handed_over() -> list[int]:
    """The signals that the program before this one could not act on any more, in `become`. Once; then none."""
    if (name := os.environ.pop(_HANDED_VARIABLE, None)) is None:
        return []
    with open(int(name), "rb", buffering=0) as pipe:
        return [number for number in pipe.read(64) or b"" if number in STOP_SIGNALS]


def _stop(number: int, frame: FrameType | None) -> None:
    reason, code = STOP_SIGNALS[signal.Signals(number)]
    with suppress(OSError):
        os.write(2, f"{reason}: nothing is under way\n".encode())
    if "ray" in sys.modules:  # after the run: its last clean-up is given up
        end(code)
    os._exit(code)


def end(code: int) -> NoReturn:
    """End the process now, whatever its threads do. Of a Ray of its own nothing stays: agents would, for 20 seconds."""
    from rlinf_lite.cluster import own_ray

    own_ray.end()
    os._exit(code)
