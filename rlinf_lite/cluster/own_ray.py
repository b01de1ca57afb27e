"""The processes of a Ray that this driver started, found and ended by process id. Does not import Ray.

A cluster that this driver joined is never touched, even where its processes are children of this one: a container's
entry point may call `ray start`, then exec the driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

_END_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_VARIABLE = "RLINF_LITE_OWN_RAY"
"""Environment variable: the id of the process that started a Ray. It outlives `os.execv`, as the id does; a child that
inherits it has another id."""


def note_start() -> None:
    """This driver has a Ray of its own. To be called before that is started: a start that fails may leave parts."""
    os.environ[_VARIABLE] = str(os.getpid())


def note_join() -> None:
    """This driver uses a Ray that somebody else started."""
    os.environ.pop(_VARIABLE, None)


def started() -> bool:
    """Whether this driver started a Ray, or tried to; in an earlier life, too, as long as it joined no other."""
    return os.environ.get(_VARIABLE) == str(os.getpid())


def adopt_orphans() -> None:
    """Become the parent of what a dead raylet leaves behind (its agents, a stopped worker), so that `end` finds it.

    To be called before Ray is started. Does nothing where there is no such thing as on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def roots() -> list[psutil.Process]:
    """The parts of Ray that are children of this process: raylet, GCS, log monitor ..., and orphans of a raylet.

    Empty if this driver did not start a Ray.
    """
    spec = importlib.util.find_spec("ray") if started() else None
    if spec is None or spec.origin is None:
        return []
    place = str(Path(spec.origin).parent)
    session = _session_of(os.getpid())
    return [
        child
        for child in psutil.Process().children()
        # Workers and agents hide their command line; they are children of this process once their raylet is dead.
        if (place in (line := command(child)) and session.search(line)) or _name(child).startswith("ray::")
    ]


def _session_of(pid: int) -> re.Pattern[str]:
    """The name of a session, which Ray ends with the id of the process that starts it."""
    return re.compile(rf"session_[-_\d]+_{pid}(?![-_\d])")


def end() -> None:
    """Kill all of them, with the workers and agents below; returns when they are gone. Does nothing if there are none.

    In place of ``ray.shutdown()`` where nobody may be waited for: that takes two seconds, seven without a GCS, and
    leaves Ray's agents behind, which take twenty to notice that their raylet is dead.
    """
    deadline = time.monotonic() + _END_SECONDS
    while (found := roots()) and time.monotonic() < deadline:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # a raylet that goes on starting workers would leave some that nobody knows of
        everyone = {*found, *(below for process in found for below in _below(process))}
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=max(0.0, deadline - time.monotonic()))


def _below(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _name(process: psutil.Process) -> str:
    """Also of one that has ended and was not reaped yet, which has no command line any more."""
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def command(process: psutil.Process) -> str:
    """The command line; empty if it is gone or another user's."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return ""
