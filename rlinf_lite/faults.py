"""Fault injection for tests: the process fails in a given phase, rank and step. Does nothing by default.

``RLINF_LITE_FAULTS='[{"phase": "save.manifest", "step": 4, "action": "kill"}]'``; actions: ``kill`` (SIGKILL to
itself), ``hang``, ``wait`` (three seconds), or the name of an errno (``ENOSPC``). A fault without ``rank`` strikes
every rank. With ``"mark": PATH`` it creates that file first, so that a test can wait for the phase. With
``"armed": PATH`` it strikes only if that file exists, and removes it, so that a test decides when.

Phases of a start, a resume or a rollback, in order. Each is reached right before one change on disk. The step is the
one to resume from (0 for a new run).

==========================  ======================================================================================
phase                       the change that comes next
==========================  ======================================================================================
``resume.sweep``            incomplete saves of a killed run are removed
``resume.aside``            a checkpoint newer than the start is renamed; reached once for each, newest first, and
                            there ``step`` is the step of that checkpoint
``resume.config``           the config is written
``resume.event``            the start (or the way back) is appended to ``events.jsonl``
``resume.rollouts``         rows after the step are dropped from ``rollouts.jsonl`` (a new run: the file is renamed)
``resume.metrics``          the same for ``metrics.jsonl``
``resume.tensorboard``      a new event file hides the rows after the step
``resume.wandb``            the wandb run is opened, and is sent what it lacks
``resume.ready``            none: the first step begins
==========================  ======================================================================================
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from rlinf_lite.paths import expand

VARIABLE = "RLINF_LITE_FAULTS"
_SECONDS = {"hang": 3600, "wait": 3}


@functools.cache
def _table() -> list[dict[str, Any]]:
    return json.loads(os.environ.get(VARIABLE, "[]"))


def reach(phase: str, *, step: int, rank: int = 0, path: str | None = None) -> None:
    """Called where a fault may strike: at the beginning of ``phase``."""
    for fault in _table():
        if fault["phase"] == phase and fault.get("rank", rank) == rank and fault.get("step", step) == step:
            if "armed" in fault and not _disarm(Path(fault["armed"])):
                continue
            if "mark" in fault:
                Path(expand(fault["mark"])).touch()
            _strike(fault["action"], path)


def is_planned(phase: str, action: str, *, step: int, rank: int) -> bool:
    """Whether the caller shall do damage that `reach` cannot: ``flip`` changes the sign of an element of a weight."""
    fault = {"phase": phase, "action": action, "step": step, "rank": rank}
    return any(all(planned.get(key, value) == value for key, value in fault.items()) for planned in _table())


def _disarm(path: Path) -> bool:
    """Whether it was armed; of several processes that come at once only one is told so."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _strike(action: str, path: str | None) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action in _SECONDS:
        time.sleep(_SECONDS[action])
    else:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code), path)
