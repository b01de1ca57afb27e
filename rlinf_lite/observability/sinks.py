"""What a place for metrics promises. One page, so that a new one can be written from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Metrics = Mapping[str, float | int]
"""The flat record of one step: ``reward/mean``, ``loss/policy``, ``time/rollout``, ``val/accuracy`` ..."""


class MetricSink(Protocol):
    """A place where the metrics of each step go.

    Who calls when: the driver alone, from one thread. A sink is built when the run starts or resumes; ``log`` is called
    once for each step, with rising steps (`MetricHub` sees to that), *before* the step's checkpoint is begun; ``close``
    once, at the end or after a failure.

    What a kill means: when ``log`` returns, the row outlives the process (the operating system has it), or the sink can
    get it back from ``metrics.jsonl``, where that holds. So every row up to a committed checkpoint is there.

    What a resume means: the sink is built with ``committed_step``, the step of the checkpoint that the run goes on
    from. Rows up to it stay. Rows after it are those of the run that was left; they come again, with equal numbers, or
    with others (`Origin` says which). So a sink takes them back (``metrics.jsonl``), hides them (TensorBoard), or
    compares (wandb: equal ones are left out, others go to a new run). In the end each step is there exactly once, as it
    came last. ``committed_step`` None is a new run: what an earlier run left in the same place must
    not mix with it.
    """

    def log(self, step: int, metrics: Metrics) -> None:
        """Record one row: ``step`` is the number of completed steps."""

    def close(self) -> None:
        """Finish writing. Calling it again does nothing."""
