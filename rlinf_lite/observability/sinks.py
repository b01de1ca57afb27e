"""The interface of metric sinks, with all that is needed to write a new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Metrics = Mapping[str, float | int]
"""The flat record of one step: ``reward/mean``, ``loss/policy``, ``time/rollout``, ``val/accuracy`` ..."""


class MetricSink(Protocol):
    """A destination of the metrics of each step.

    Who calls when: the driver, from one thread. A sink is built when the run starts or resumes. ``log`` is called once
    per step, with increasing steps (`MetricHub` checks it), *before* the save of that step begins. ``close`` is called
    once, at the end or after a failure.

    What a kill means: when ``log`` returns, the row survives the process (the operating system has it), or the sink can
    read it back from ``metrics.jsonl``, which has this property. So every row up to a committed checkpoint exists.

    What a resume means: the sink is built with ``committed_step``, the step of the checkpoint that the run resumes
    from. Rows up to it stay. Later rows were logged by the killed process; they are logged again, with equal or other
    numbers (`Origin` says which). So a sink drops them (``metrics.jsonl``), hides them (TensorBoard), or compares them
    (wandb skips equal rows, and starts a new run for others). In the end each step appears exactly once, as it was
    logged last. ``committed_step`` None is a new run, which must not mix with an earlier run in the same directory.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Record one row: ``step`` is the number of completed steps."""

    def close(self) -> None:
        """Finish writing. Calling it again does nothing."""
