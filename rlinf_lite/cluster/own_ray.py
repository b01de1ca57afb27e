"""The processes of a Ray that a driver has started for itself, found and ended by process id. Does not import Ray.

A cluster that the driver joined is never touched, even where its processes are children of this one: a container's
entry point may call `ray start`, then exec the launcher.
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

from rlinf_lite.cluster.forks.client import MODULE

_END_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_starter: int | None = None
"""The process that has started a Ray: a forked child has another id."""


def note_start() -> None:
    """This driver has a Ray of its own. To be called before that is started: a start that fails may leave parts."""
    global _starter
    _starter = os.getpid()


def started() -> bool:
    """Whether this driver started a Ray, or tried to."""
    return _starter == os.getpid()


def adopt_orphans() -> None:
    """Become the parent of what dead processes below leave behind: a raylet's agents and workers, a driver's Ray.

    So `end_of` finds it. To be called before Ray is started. Does nothing on systems other than Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def roots(driver: int) -> list[psutil.Process]:
    """The parts of a driver's Ray that are children of this process: raylet, GCS ..., and orphans of a raylet.

    Args:
        driver: process id of the driver that started that Ray: this process, or one that has ended.
    """
    spec = importlib.util.find_spec("ray")
    if spec is None or spec.origin is None:
        return []
    place = str(Path(spec.origin).parent)
    session = _session_of(driver)
    return [
        child
        for child in psutil.Process().children()
        # Workers and agents hide their command line; they are children of this process once their raylet is dead.
        if (place in (line := command(child)) and session.search(line)) or _name(child).startswith("ray::")
    ]


def _fork_servers(driver: int) -> list[psutil.Process]:
    """The driver's fork server, above its workers."""
    name = f"{MODULE} {driver} "
    return [child for child in psutil.Process().children() if name in command(child)]


def _session_of(pid: int) -> re.Pattern[str]:
    """The name of a session, which Ray ends with the id of the process that starts it."""
    return re.compile(rf"session_[-_\d]+_{pid}(?![-_\d])")


def end() -> None:
    """Kill the Ray that this process has started, if there is one; returns when its processes are gone.

    In place of ``ray.shutdown()`` where nobody may be waited for: that takes two seconds, seven without a GCS, and
    leaves Ray's agents behind, which take twenty to notice that their raylet is dead.
    """
    if started():
        end_of(os.getpid())


def end_of(driver: int) -> None:
    """Kill the Ray that ``driver`` has started, as far as `roots` finds it, with the workers and agents below."""
    deadline = time.monotonic() + _END_SECONDS
    while (found := [*roots(driver), *_fork_servers(driver)]) and time.monotonic() < deadline:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # a running raylet would start more workers meanwhile
        everyone = {*found, *(below for process in found for below in _below(process))}
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=max(0.0, deadline - time.monotonic()))


def _below(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        below: list[psutil.Process] = process.children(recursive=True)
        return below
    return []


def _name(process: psutil.Process) -> str:
    """Also of one that has ended and was not reaped yet, which has no command line any more."""
    with suppress(psutil.NoSuchProcess):
        name: str = process.name()
        return name
    return ""


def command(process: psutil.Process) -> str:
    """The command line; empty if it is gone or another user's."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return ""
