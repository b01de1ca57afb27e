"""TensorBoard event files that show each step once, however often the run was killed."""

from __future__ import annotations

import re
import time
from pathlib import Path

from rlinf_lite.config import ConfigError
from rlinf_lite.observability.notices import say
from rlinf_lite.observability.sinks import Metrics

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_LONGEST_WAIT_SECONDS = 3


class TensorBoardSink:
    """One scalar a metric.

    Args:
        log_dir: folder of the event files.
        committed_step: events of later steps in older files are marked as replaced; None (a new run): all of them.

    Raises:
        ConfigError: the package tensorboard is missing.
    """

    def __init__(self, log_dir: Path, *, committed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "runner.logger.logger_backends: tensorboard is not installed; pip install tensorboard, or leave it out"
            ) from None
        _wait_for_a_later_name(log_dir)
        purge_step = 0 if committed_step is None else committed_step + 1
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        # The writer's own thread flushes every two minutes: a kill would take rows of committed steps with it.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _wait_for_a_later_name(log_dir: Path) -> None:
    """Readers take event files in the order of the second in their name: ours must come after those it replaces."""
    matches = [_EVENT_FILE.match(path.name) for path in log_dir.glob("events.out.tfevents.*")]
    newest = max((int(match[1]) for match in matches if match), default=0)
    behind = newest + 1 - time.time()
    if 0 < behind <= _LONGEST_WAIT_SECONDS:
        time.sleep(behind)
    elif behind > 0:
        say(f"tensorboard: this clock is {behind:.0f} s behind the newest event file; replayed steps may show twice")
