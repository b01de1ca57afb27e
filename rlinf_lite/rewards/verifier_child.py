"""The script of the verifier's child process: checks one request per line of input.

A request is a JSON line such as ``{"reference": ..., "answer": ...}``, a reply ``{"correct": ...}`` or
``{"error": ...}``. The first line written says whether the verifier works. For math-verify only `expressions` of the
project is loaded, to start quickly.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import IO, Any

Request = dict[str, Any]
Reply = dict[str, Any]

MAX_MEMORY_BYTES = 4 * 1024**3


def main() -> None:
    cpu_seconds, subject = float(sys.argv[1]), sys.argv[2]
    start, handle = _SUBJECTS[subject]
    replies = _take_stdout()
    _set_limits()
    gc.disable()  # what is imported stays; the collector would walk over it again and again
    state = start()
    gc.freeze()
    gc.enable()
    _write(replies, state)
    if "error" in state:
        return
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # When this timer expires the kernel kills the process. No Python code has to run for that, so it also works
        # in a C function that holds the GIL.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = _reply(handle, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(replies, reply)


def _take_stdout() -> IO[str]:
    """Move standard output to a new descriptor, for replies alone; what libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _set_limits() -> None:
    """Limit memory, and reset the signal mask and handler that the parent may have handed down."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)


def _reply(handle: Callable[[Request], Reply], request: Request) -> Reply:
    # sympy tests some equalities at random points: equal texts must be tested at equal points.
    random.seed(0)
    try:
        return handle(request)
    except Exception as error:  # A library may raise anything on a model's text; this process continues.
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _start_math() -> Reply:
    try:
        _expressions()
    except ImportError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    # With the wrong antlr runtime, math-verify can be imported but parses no LaTeX, and grades everything as wrong.
    if _reply(_math, {"reference": r"\frac{1}{2}", "answer": "0.5"}) != {"correct": True}:
        return {"error": "math-verify cannot read LaTeX; pip install 'math-verify[antlr4-9-3]'"}
    return {"ready": True}


@lru_cache
def _expressions() -> ModuleType:
    """The module `expressions`, loaded by path because its package would import numpy."""
    spec = spec_from_file_location("expressions", Path(__file__).with_name("expressions.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _math(request: Request) -> Reply:
    from sympy.core.random import seed

    seed(0)
    same_expression = _expressions().same_expression
    return {"correct": same_expression(request["reference"], request["answer"], request.get("up_to_factor", False))}


def _start_reasoning_gym() -> Reply:
    try:
        from rlinf_lite.rewards import reasoning_gym_tasks  # noqa: F401
    except ImportError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ready": True}


def _reasoning_gym(request: Request) -> Reply:
    from rlinf_lite.rewards.reasoning_gym_tasks import reply_to

    return reply_to(request)


_SUBJECTS: dict[str, tuple[Callable[[], Reply], Callable[[Request], Reply]]] = {
    "math-verify": (_start_math, _math),
    "reasoning-gym": (_start_reasoning_gym, _reasoning_gym),
}


def _write(replies: IO[str], reply: Reply) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
