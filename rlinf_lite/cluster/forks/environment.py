"""The environment of worker processes."""

from __future__ import annotations

from rlinf_lite import numerics


def worker_env(threads: int, device: str) -> dict[str, str]:
    """Return the variables of every worker process; libraries read them when they are imported.

    Args:
        threads: ``cluster.threads_per_worker``.
        device: ``cpu`` or ``cuda``.
    """
    env = numerics.environment(threads) | {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
    }
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env
