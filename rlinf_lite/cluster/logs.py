"""The last lines of output of a worker process, from Ray's log files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ray

_TAIL_BYTES = 8192


def last_lines(pid: int, count: int = 5) -> list[str]:
    """Return the last lines that a worker process wrote to stdout or stderr; none if it ran on another machine."""
    return [line for file in _files(pid) for line in _tail(file)][-count:]


def _files(pid: int) -> Iterator[Path]:
    node = ray._private.worker._global_node
    if node is None:
        return
    directory = Path(node.get_logs_dir_path())
    for ending in ("out", "err"):
        yield from directory.glob(f"worker-*-{pid}.{ending}")


def _tail(file: Path) -> list[str]:
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    # Lines that begin with a colon are Ray's own marks.
    return [line.rstrip() for line in lines if line.strip() and not line.startswith(":")]
