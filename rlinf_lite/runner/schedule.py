"""The number of steps of a run, and when validation is due. Pure functions of settings and step."""

from __future__ import annotations

from rlinf_lite.config import ConfigError, OptimConfig, RunnerConfig


def total_steps(runner: RunnerConfig, *, num_problems: int, batch: int) -> int:
    """Return the steps of the whole run: the smaller of what ``max_steps`` and ``max_epochs`` allow.

    Args:
        num_problems: of an epoch.
        batch: problems per step.

    Raises:
        ConfigError: the epochs are less than one batch.
    """
    epochs = runner.max_epochs
    limits = [runner.max_steps] if runner.max_steps > 0 else []
    if epochs > 0:
        limits.append(epochs * num_problems // batch)
    if min(limits) < 1:
        raise ConfigError(
            f"runner.max_epochs={epochs}: {num_problems} problems in {epochs} epochs do not fill one batch of "
            f"data.rollout_batch_size={batch}; lower it, or raise runner.max_epochs to {-(-batch // num_problems)}"
        )
    return min(limits)


def total_updates(optim: OptimConfig, steps: int, num_minibatches: int) -> int:
    """Return the optimizer steps over which the learning rate decays, in a run of ``steps`` training steps."""
    return optim.total_training_steps or steps * num_minibatches


def due(step: int, interval: int, last: int) -> bool:
    """Return whether something that happens every ``interval`` steps (-1: only at the end) is due after ``step``."""
    return step == last or (interval > 0 and step % interval == 0)
