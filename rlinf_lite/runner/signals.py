"""The signals that ask a run to stop or to save; ending the driver process without waiting for anything."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME, EXIT_WORKER_LOST

STOP_SIGNALS: dict[int, tuple[str, int]] = {
    signal.SIGTERM: ("SIGTERM", EXIT_OUT_OF_TIME),
    signal.SIGUSR1: ("SIGUSR1", EXIT_OUT_OF_TIME),
    signal.SIGINT: ("Ctrl-C", EXIT_INTERRUPTED),
}
"""Reason and exit code of each."""
SAVE_SIGNAL = signal.SIGUSR2


def end_at_once() -> None:
    """From now on each stop signal ends the process with its code: there is no work to save yet.

    `interruption.on_signals` takes them over. A signal that is ignored stays ignored.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    reason, code = STOP_SIGNALS[number]
    with suppress(OSError):
        os.write(2, f"{reason}: stopped, there was nothing to save\n".encode())
    end(code)


def end_without_parent() -> None:
    """End the driver when its parent has died: nobody would forward a stop signal to it any more."""
    with suppress(OSError):
        os.write(2, b"the parent process is gone: the driver ends\n")
    end(EXIT_WORKER_LOST)


def end(code: int) -> NoReturn:
    """End the process now, whatever its threads do, and with it the Ray that it started."""
    if "ray" in sys.modules:
        # Its agents would stay for 20 seconds.
        from rlinf_lite.cluster import own_ray

        own_ray.end()
    os._exit(code)
