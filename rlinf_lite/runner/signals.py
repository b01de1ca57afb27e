"""The signals that stop a run, and how the process ends at once. Light: it is imported before everything else."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from rlinf_lite.runner.exit_codes import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME

STOP_SIGNALS = {
    signal.SIGTERM: ("SIGTERM", EXIT_OUT_OF_TIME),
    signal.SIGUSR1: ("SIGUSR1", EXIT_OUT_OF_TIME),
    signal.SIGINT: ("Ctrl-C", EXIT_INTERRUPTED),
}
"""Reason and exit code of each."""


def end_at_once() -> None:
    """From now on each of the signals ends the process, with the code of a stop: nothing is under way.

    Except while `interruption.on_signals` takes them. What is ignored stays so.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a driver that starts itself anew blocks them


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
