"""What a user reads when a run ends early: one clear message and an exit code, no wall of traceback."""

from __future__ import annotations

from rlinf_lite import numerics
from rlinf_lite.cluster.errors import ClusterError, RayLost, WorkerLost
from rlinf_lite.config import ConfigError
from rlinf_lite.rewards import VerifierStartError
from rlinf_lite.runner.exit_codes import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    EXIT_WORKER_LOST,
)

_SAME_AGAIN = (
    "A resume would come to the same numbers: change something, and allow it by name with runner.resume_allow_changes."
)
_NO_MEMORY = (
    "GPU memory is full: lower algorithm.training_batch_size_per_gpu, algorithm.logprob_forward_micro_batch_size or "
    "rollout.kv_cache_gb, or set actor.fsdp_config.gradient_checkpointing=true."
)
_NOT_LOST = "Nothing that was committed is lost."
_AGAIN = "Start the same command again"
_RESUME = f"{_NOT_LOST} {_AGAIN}, with runner.resume_dir=auto if the run has saved a checkpoint."


def explain(error: BaseException) -> tuple[str | None, int]:
    """The message and exit code for ``error``; no message for what is a bug of ours and deserves its traceback."""
    from rlinf_lite.recovery.restarts import GaveUp
    from rlinf_lite.runner.interruption import Interrupted  # it reads the codes above

    if isinstance(error, ConfigError | ClusterError | VerifierStartError):
        return _lines("error", error), EXIT_USER_ERROR
    if isinstance(error, GaveUp):
        return f"{_lines('error', error)}\n{_NOT_LOST}", EXIT_WORKER_LOST
    if isinstance(error, WorkerLost | RayLost):
        return f"{_lines('error', error)}\n{_RESUME}", EXIT_WORKER_LOST
    if isinstance(error, Interrupted):
        return f"interrupted by {error.reason}, before the first step. {_NOT_LOST} {_AGAIN}.", error.code
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted. {_RESUME}", EXIT_INTERRUPTED
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return f"{_lines('error', error)}\n{_NO_MEMORY}", EXIT_USER_ERROR
    if isinstance(error, numerics.NotDeterministic):
        return _lines("error", error), EXIT_USER_ERROR
    if isinstance(error, FloatingPointError):
        return f"{_lines('error', error)}\n{_SAME_AGAIN}", EXIT_USER_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        return f"error: {error.filename}: {error.strerror}", EXIT_USER_ERROR
    if type(error).__module__.startswith(("rlinf_lite.checkpoint", "rlinf_lite.data")):
        return _lines("error", error), EXIT_USER_ERROR
    return None, 1


def _lines(kind: str, error: BaseException) -> str:
    return "\n".join(f"{kind}: {line}" if not line.startswith("  ") else line for line in str(error).splitlines())
