"""JSON lines by step (metrics, rollouts) in a file in which each step's rows appear exactly once, across resumes.

Floats are read back exactly. NaN and infinities are written as Python's json module does.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rlinf_lite.durable import replaced_file
from rlinf_lite.observability.notices import log_line
from rlinf_lite.paths import open_fixed

_STEP = re.compile(rb'\{"step": (-?\d+)[,}]')


class JsonlSink:
    """Appends rows ``{"step": 7, ...}``; a step may have several.

    Args:
        path: the file; missing directories are created.
        committed_step: step that the run resumes from; rows of later steps, and an incomplete last line, are dropped.
            None for a new run: an existing file is renamed.
    """

    def __init__(self, path: Path, *, committed_step: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if committed_step is None:
            _rename_existing(path)
        else:
            _drop_after(path, committed_step)
        self._path = path
        self._file = open(path, "ab", buffering=0, opener=open_fixed)  # noqa: SIM115
        self._waiting = b""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.log_rows(step, [metrics])

    def log_rows(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append several rows of one step; they have reached the operating system when this returns.

        On a full disk the rows stay in memory and are written with the next ones.
        """
        for row in rows:
            assert "step" not in row, "the step is the first argument"
            self._waiting += (json.dumps({"step": step, **row}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            log_line(f"!! {self._path}: {error.strerror}; its rows are kept in memory from step {step} on")

    def _write(self) -> None:
        # A write may end within a row. The rest of the row is written next, so the file stays complete.
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def sync(self) -> None:
        """Make every row durable, so that the rows of the next checkpoint survive a power loss.

        Raises:
            OSError: a row cannot be written.
        """
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is still in memory, and close the file.

        Raises:
            OSError: a row cannot be written.
        """
        if not self._file.closed:
            try:
                self._write()
            finally:
                self._file.close()


def read_jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `JsonlSink` wrote; none if there is no file. Damaged lines are left out."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    if isinstance(row := json.loads(line), dict):
                        yield row


def rows_of_step(path: Path, step: int, limit: int) -> list[dict[str, Any]]:
    """The first ``limit`` rows of one step, found by bisection: in a file of many GB as fast as in a small one."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        file.seek(seek_step(file, step))
        for line in file:
            found = step_of(line) if line.endswith(b"\n") else None
            if len(rows) == limit or (found is not None and found > step):
                break
            if found == step:
                with suppress(ValueError):  # a damaged row; the others stay readable
                    rows.append(json.loads(line))
    return rows


def seek_step(file: BinaryIO, step: int) -> int:
    """The byte where the first line of ``step``, or of a later step, begins. Steps must increase in the file."""
    low, high = 0, file.seek(0, os.SEEK_END)
    while low < high:
        middle = (low + high) // 2
        file.seek(max(middle - 1, 0))
        if middle:
            file.readline()  # to the end of the line that holds the byte before
        begin, line = file.tell(), file.readline()
        found = step_of(line) if line.endswith(b"\n") else None
        if found is None or found >= step:
            high = middle
        else:
            low = begin + len(line)
    return low


def first_step(path: Path) -> int | None:
    """The step of the first row; None if there is no row."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return next((step for line in file if line.endswith(b"\n") and (step := step_of(line)) is not None), None)


def missing_steps(path: Path, last: int) -> list[int]:
    """The steps up to ``last`` that have no row or several. Steps before the first row do not count."""
    found: Counter[int] = Counter()
    if path.exists():
        with path.open("rb") as file:
            found.update(step for line in file if line.endswith(b"\n") and (step := step_of(line)) is not None)
    first = min((step for step in found if step <= last), default=1)
    return [step for step in range(first, last + 1) if found[step] != 1]


def _rename_existing(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:  # a start that was killed before its first row leaves it empty
        return
    number = 1
    while (old := path.with_name(f"{path.stem}.old{number}{path.suffix}")).exists():
        number += 1
    path.rename(old)
    log_line(f"{path.name}: a new run starts here; the rows of an earlier run are now in {old.name}")


def _drop_after(path: Path, committed_step: int) -> None:
    """Drop the rows of later steps. A file with nothing to drop is only read."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if all(_stays(line, committed_step) for line in file):
            return
        file.seek(0)
        with replaced_file(path) as kept:
            kept.writelines(line for line in file if _stays(line, committed_step))


def _stays(line: bytes, committed_step: int) -> bool:
    step = step_of(line) if line.endswith(b"\n") else None
    return step is not None and step <= committed_step


def step_of(line: bytes) -> int | None:
    """The step of a line; None if the line is not a row."""
    # Rollout rows are long and many, so their step is read from the prefix that log_rows writes.
    if match := _STEP.match(line):
        return int(match[1])
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else None
