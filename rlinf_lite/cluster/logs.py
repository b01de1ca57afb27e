"""The last words of a worker process, from the files that Ray keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ray

_TAIL_BYTES = 8192


def last_lines(pid: int, count: int = 5) -> list[str]:
    """What a worker process wrote last to stdout or stderr; nothing if it ran on another machine."""
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
    # Ray's own marks, for tools that join its files.
    return [line.rstrip() for line in lines if line.strip() and not line.startswith(":")]
