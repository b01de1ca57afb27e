"""A verifier behind a pipe: the child's end, run as a script. For math-verify only
`expressions` of the project is loaded.

Each line read is a request (``{"reference": ..., "answer": ...}``), each line written a reply (``{"correct": ...}`` or
``{"error": ...}``). The first line written says whether the verifier works here.
"""

from __future__ import annotations

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
    start, grader = _SUBJECTS[subject]
    replies = _own_stdout()
    _limit_damage()
    greeting = start()
    _say(replies, greeting)
    if "error" in greeting:
        return
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # At the end of this timer the kernel ends the process: no Python code has to run for it, so it also
        # works in a C routine that never gives up the GIL.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = _reply(grader, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(replies, reply)


def _own_stdout() -> IO[str]:
    """The reply pipe under a new number; whatever a library prints from now on goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _limit_damage() -> None:
    """Undo what a parent may hand down (blocked or ignored signals), and fail before the machine's memory is full."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)


def _reply(grader: Callable[[Request], Reply], request: Request) -> Reply:
    # sympy tests some equalities at random points: the same text must meet the same points.
    random.seed(0)
    try:
        return grader(request)
    except Exception as error:  # Whatever a library makes of a model's text, this process goes on.
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _start_math() -> Reply:
    try:
        _expressions()
    except ImportError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    # With another antlr runtime math-verify imports, reads no LaTeX, and calls everything wrong.
    if _reply(_math, {"reference": r"\frac{1}{2}", "answer": "0.5"}) != {"correct": True}:
        return {"error": "math-verify cannot read LaTeX; pip install 'math-verify[antlr4-9-3]'"}
    return {"ready": True}


@lru_cache
def _expressions() -> ModuleType:
    """The module beside this one, without its package, which would import numpy."""
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
    from rlinf_lite.rewards.reasoning_gym_tasks import answer

    return answer(request)


_SUBJECTS: dict[str, tuple[Callable[[], Reply], Callable[[Request], Reply]]] = {
    "math-verify": (_start_math, _math),
    "reasoning-gym": (_start_reasoning_gym, _reasoning_gym),
}


def _say(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
