"""How far the reading of the data is: a bar on a terminal, elsewhere a line every few seconds; a line at the end."""

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
_WORTH_A_LINE_SECONDS = 1.0


class Progress:
    """A context: what is read is said while it is read, if that takes longer than a moment."""

    def __init__(self, source: str, num_bytes: int, meter: Meter) -> None:
        self._source, self._num_bytes, self._meter, self._num_rows = source, num_bytes, meter, 0
        self._started = self._said = time.monotonic()
        self._bar = tqdm(
            total=num_bytes or None,
            desc=f"reading {source}",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            delay=_WORTH_A_LINE_SECONDS,
            disable=not sys.stderr.isatty(),
        )

    def update(self, num_rows: int) -> None:
        """
        Args:
            num_rows: read so far.
        """
        self._num_rows, now = num_rows, time.monotonic()
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
            self._bar.update(self._meter.num_bytes - self._bar.n)
        elif now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
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
        if error is None and seconds >= _WORTH_A_LINE_SECONDS:
            size = f", {readable.size(self._num_bytes)}" if self._num_bytes else ""
            log_line(f"data: read {self._source}: {self._num_rows:,} rows{size} in {seconds:.1f} s")
