"""Prints one aligned line per step and, on a terminal, a progress bar below the lines."""

from __future__ import annotations

import sys

from tqdm import tqdm

from rlinf_lite.observability.notices import log_line
from rlinf_lite.observability.sinks import Metrics
from rlinf_lite.observability.step_line import step_line


class ConsoleSink:
    """Lines go to standard output, the bar to standard error.

    Args:
        num_steps: steps of the whole run; None if there is no limit.
        committed_step: step that the run resumes from; None for a new run.
    """

    def __init__(self, *, num_steps: int | None, committed_step: int | None) -> None:
        self._num_steps = num_steps
        self._bar = tqdm(
            total=num_steps,
            initial=committed_step or 0,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        log_line(step_line(step, metrics, self._num_steps))
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
