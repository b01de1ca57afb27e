"""Errors that end a program with a message and an exit code instead of a traceback, and the exit codes themselves."""

from __future__ import annotations

from typing import Any, ClassVar

EXIT_USER_ERROR = 2
EXIT_WORKER_LOST = 3
EXIT_OUT_OF_TIME = 75
"""EX_TEMPFAIL: stopped before the end by ``runner.max_time``, SIGTERM, SIGUSR1 or a drained node, and saved; start
again with ``runner.resume_dir=auto``."""
EXIT_INTERRUPTED = 130

NOTHING_LOST = "Nothing that was committed is lost."
RESUME_ADVICE = (
    f"{NOTHING_LOST} Start the same command again, with runner.resume_dir=auto if the run has saved a checkpoint."
)
_ABSENT: Any = object()


class UserError(Exception):
    """An error that the user can act on; its text is all that is printed.

    Subclasses also inherit the builtin exception that they refine. Each can be pickled with its attributes, whatever
    its ``__init__`` takes, because errors travel between processes.
    """

    exit_code: ClassVar[int] = EXIT_USER_ERROR
    advice: ClassVar[str] = ""
    """Printed after the text when the error ends a run; empty: nothing to add."""

    def __init__(self, problem: str, *, key: str | None = None, value: Any = _ABSENT, remedy: str | None = None):
        """
        Args:
            problem: what is wrong; one line per problem.
            key: the config key, file or variable that is wrong, printed first.
            value: what ``key`` holds.
            remedy: what to do about it, printed last.
        """
        self.key, self.value, self.remedy = key, None if value is _ABSENT else value, remedy
        subject = "" if key is None else f"{key}: " if value is _ABSENT else f"{key}={value}: "
        super().__init__(f"{subject}{problem}{f'; {remedy}' if remedy else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args), self.__dict__

    def lines(self) -> str:
        """The text with ``error:`` in front of every line that does not continue another (those are indented)."""
        return "\n".join(line if line.startswith("  ") else f"error: {line}" for line in str(self).splitlines())


def _restore(kind: type[UserError], args: tuple[Any, ...]) -> BaseException:
    """Make an error without calling its ``__init__``; pickle then fills in the attributes."""
    # OSError has a memory layout of its own, so its subclasses can only be made by its __new__.
    error = (OSError if issubclass(kind, OSError) else Exception).__new__(kind)
    error.args = args
    return error


class ConfigError(UserError, ValueError):
    """A config that cannot be run. The message has one line per problem: key, value, remedy."""


class OutOfMemory(UserError, RuntimeError):
    """The memory of a GPU is full."""

    advice = (
        "GPU memory is full: lower runner.max_tokens_per_mbs or algorithm.training_batch_size_per_gpu, "
        "algorithm.logprob_forward_micro_batch_size or rollout.kv_cache_gb, or set "
        "actor.fsdp_config.gradient_checkpointing=true."
    )


class NotFinite(UserError, FloatingPointError):
    """A loss, gradient, weight or logit is NaN or infinite."""

    advice = (
        "A resume would come to the same numbers: change something, and allow it by name with "
        "runner.resume_allow_changes."
    )


class WeightsDiffer(UserError, RuntimeError):
    """A rollout engine holds other weights than the policy sent."""

    advice = RESUME_ADVICE


def explain(error: BaseException) -> tuple[str | None, int]:
    """The message and exit code for an error that ends a program; no message for a bug, which needs its traceback."""
    if isinstance(error, UserError):
        return f"{error.lines()}\n{error.advice}".rstrip("\n"), error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}", EXIT_USER_ERROR
    return None, 1
