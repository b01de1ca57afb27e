"""The message and exit code of a run that ends early."""

from __future__ import annotations

from rlinf_lite import errors
from rlinf_lite.runner.interruption import Interrupted


def explain(error: BaseException) -> tuple[str | None, int]:
    """The message and exit code for ``error``; no message for a bug, which needs its traceback."""
    if isinstance(error, Interrupted):
        message = f"interrupted by {error.reason}, before the first step. {errors.NOTHING_LOST} "
        return f"{message}Start the same command again.", error.code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted. {errors.RESUME_ADVICE}", errors.EXIT_INTERRUPTED
    return errors.explain(error)
