"""Progress of loading the data: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from rlinf_lite import readable
from rlinf_lite.data.files import Meter
from rlinf_lite.observability import log_line

_SECONDS_BETWEEN_LINES = 10.0
_SHOWN_FROM_SECONDS = 1.0


class Progress:
    """A context manager that shows progress while the data is loaded, if that takes more than a second.

    Args:
        source: what is read, for the lines.
        num_bytes: total size of the files, 0 if not known.
        meter: counts the bytes that were read.
    """

    def __init__(self, source: str, num_bytes: int, meter: Meter) -> None:
        self._source, self._num_bytes, self._meter, self._num_rows = source, num_bytes, meter, 0
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=num_bytes or None,
            desc=f"reading {source}",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            delay=_SHOWN_FROM_SECONDS,
            disable=not sys.stderr.isatty(),
        )

    def update(self, num_rows: int) -> None:
        """Set the number of rows that were read so far."""
        self._num_rows, now = num_rows, time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
            self._bar.update(self._meter.num_bytes - self._bar.n)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            done = f"{num_rows:,} rows in {now - self._started:.0f} s"
            if self._num_bytes:
                done += f", {self._meter.num_bytes / self._num_bytes:.0%} of {readable.size(self._num_bytes)}"
            log_line(f"data: reading {self._source}: {done} ...")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        seconds = time.monotonic() - self._started
        if error is None and seconds >= _SHOWN_FROM_SECONDS:
            size = f", {readable.size(self._num_bytes)}" if self._num_bytes else ""
            log_line(f"data: read {self._source}: {self._num_rows:,} rows{size} in {seconds:.1f} s")
