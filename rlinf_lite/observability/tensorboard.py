"""Writes TensorBoard event files that show each step once, across kills and resumes."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from rlinf_lite.errors import ConfigError
from rlinf_lite.observability.events import EVENTS_FILE, RESTARTS, Event, History
from rlinf_lite.observability.notices import log_line
from rlinf_lite.observability.samples import markdown_table, samples_of, to_markdown
from rlinf_lite.observability.sinks import Metrics

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_LONGEST_WAIT_SECONDS = 3


class TensorBoardSink:
    """Logs one scalar per metric, a table of responses every `SAMPLE_INTERVAL` steps, and restarts.

    Args:
        log_dir: directory of the event files.
        committed_step: step that the run resumes from; later steps in older files are marked as replaced. None for a
            new run: all steps are.

    Raises:
        ConfigError: the package tensorboard is missing.
    """

    def __init__(self, log_dir: Path, *, committed_step: int | None) -> None:
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "runner.logger.logger_backends: tensorboard is not installed; pip install tensorboard, or leave it out"
            ) from None
        _wait_for_a_later_name(log_dir)
        purge_step = 0 if committed_step is None else committed_step + 1
        self._writer: Any = SummaryWriter(str(log_dir), purge_step=purge_step)
        self._summary = Summary
        self._log_path = log_dir.parent
        self._history = History(self._log_path / EVENTS_FILE, committed_step=committed_step)

    def log(self, step: int, metrics: Metrics) -> None:
        # One event for all of them: `add_scalar` writes one for each, and takes milliseconds of a step.
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), step)
        if rows := samples_of(self._log_path, step):
            self._writer.add_text("samples/rollouts", markdown_table(rows), step)
        if new := self._history.new(step):
            self._writer.add_scalar(RESTARTS, self._history.num_restarts(step), step)
            self._writer.add_text("events/what", "\n\n".join(_sentence(event) for event in new), step)
        # The writer's own thread flushes only every two minutes, so a kill would lose rows of committed steps.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _sentence(event: Event) -> str:
    return f"**{event.kind}** after step {event.step}: {to_markdown(event.text)}"


def _wait_for_a_later_name(log_dir: Path) -> None:
    """Wait until a new event file sorts after those that it replaces: readers sort them by the second in the name."""
    matches = [_EVENT_FILE.match(path.name) for path in log_dir.glob("events.out.tfevents.*")]
    newest = max((int(match[1]) for match in matches if match), default=0)
    behind = newest + 1 - time.time()
    if 0 < behind <= _LONGEST_WAIT_SECONDS:
        time.sleep(behind)
    elif behind > 0:
        log_line(
            f"tensorboard: this clock is {behind:.0f} s behind the newest event file; replayed steps may show twice"
        )
