"""Warnings about ``keep_*`` rules that never apply, because no checkpoint is saved at the steps they look for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlinf_lite.config import RunnerConfig


def never_meet(runner: RunnerConfig, last_step: int) -> Iterator[str]:
    """Yield warnings for the start of a run of ``last_step`` steps. Ignores saves by signal or deadline."""
    yield from _best_without_validation(runner, last_step)
    yield from _every_without_save(runner, last_step)


def _best_without_validation(runner: RunnerConfig, last_step: int) -> Iterator[str]:
    checkpoint = runner.checkpoint
    metric, validation, save = checkpoint.keep_best.metric, runner.val_check_interval, runner.save_interval
    if metric is None or not metric.startswith("val/") or checkpoint.save_on_best:
        return
    if save > 0 and math.lcm(validation, save) < last_step:
        return
    saves = f"saves every {save}" if save > 0 else "no saves at a number of steps"
    by_clock = "; those by the clock follow a validation by chance alone" if runner.save_interval_minutes > 0 else ""
    yield (
        f"runner.checkpoint.keep_best.metric={metric}: with a validation every {validation} steps and {saves}, no "
        f"checkpoint before the last step ({last_step}) is sure to have this metric{by_clock}; set "
        "runner.checkpoint.save_on_best=true, or let runner.save_interval be a multiple of runner.val_check_interval, "
        "both below the number of steps"
    )


def _every_without_save(runner: RunnerConfig, last_step: int) -> Iterator[str]:
    every, save = runner.checkpoint.keep_every, runner.save_interval
    if every is None or last_step % every == 0 or runner.save_interval_minutes > 0 or runner.checkpoint.save_on_best:
        return
    if save > 0 and math.lcm(every, save) <= last_step:
        return
    saves = f"saves every {save} steps" if save > 0 else "one save, after the last step,"
    yield (
        f"runner.checkpoint.keep_every={every}: with {saves} no checkpoint of the {last_step} steps is of a multiple "
        "of it; let keep_every be a multiple of runner.save_interval that the run reaches, or set it to null"
    )
