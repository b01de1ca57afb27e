"""Stores the rows of an evaluation in a file, so that an interrupted evaluation can be continued.

``FILE`` holds one JSON line per problem, durable after each generation batch. ``FILE.summary.json`` holds the settings
from the start, and the results at the end. The same command continues after the last complete batch; another evaluation
is refused, with the settings that differ.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlinf_lite.durable import replace_text
from rlinf_lite.errors import ConfigError

Row = dict[str, Any]


class MemoryLog:
    """Rows that are held in memory only, because no ``--output`` was given."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one generation batch."""
        self.rows += rows

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record the results."""

    def close(self) -> None:
        """Close the file, if there is one."""


class EvalLog(MemoryLog):
    """Rows that are also written to ``path``."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], batch_sizes: Sequence[int], *, overwrite: bool = False
    ) -> None:
        """Open ``path``, and read the rows that an interrupted evaluation left in it.

        Args:
            settings: everything that decides the numbers, as JSON values.
            batch_sizes: problems in each generation batch. Rows of an incomplete batch are dropped.
            overwrite: delete what the file holds.

        Raises:
            ConfigError: ``path`` holds something else or the rows of another evaluation, or another process writes it.
        """
        super().__init__()
        self.path, self.settings = path, dict(settings)
        self.summary_path = path.with_name(f"{path.name}.summary.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(path)
        try:
            self._continue(batch_sizes, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _continue(self, batch_sizes: Sequence[int], overwrite: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size and not overwrite:
            self._refuse_other_evaluation()
            size = self._read_rows(batch_sizes)
        self._file.truncate(0 if overwrite else size)
        self._write_summary(None)

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of one generation batch; they are durable when this returns."""
        super().append(rows)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def finish(self, results: Mapping[str, Any]) -> None:
        self._write_summary(dict(results))

    def close(self) -> None:
        self._file.close()

    def _refuse_other_evaluation(self) -> None:
        remedy = "give another --output, or --overwrite to start again"
        try:
            before = json.loads(self.summary_path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {self.path}: exists, but there is no {self.summary_path.name} with the settings of its "
                f"evaluation; {remedy}"
            ) from None
        changes = [
            f"{key}: {before.get(key, '(absent)')} -> {self.settings.get(key, '(absent)')}"
            for key in sorted(before.keys() | self.settings.keys())
            if before.get(key) != self.settings.get(key)
        ]
        if changes:
            listed = "\n  ".join(changes)
            raise ConfigError(f"--output {self.path}: holds another evaluation:\n  {listed}\n{remedy}")

    def _read_rows(self, batch_sizes: Sequence[int]) -> int:
        """Read the rows of all complete batches; returns the byte where they end."""
        rows: list[Row] = []
        ends = [0]
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # a kill interrupted the write
            rows.append(_row(line, len(rows), self.path))
            ends.append(ends[-1] + len(line))
        num_kept = 0
        for size in batch_sizes:
            if num_kept + size > len(rows):
                break
            num_kept += size
        self.rows = rows[:num_kept]
        return ends[num_kept]

    def _write_summary(self, results: dict[str, Any] | None) -> None:
        content = {"settings": self.settings, "results": results}
        replace_text(self.summary_path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _open_locked(path: Path) -> BinaryIO:
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"--output {path}: another evaluation is writing to it; give another file") from None
    return file


def _row(line: bytes, number: int, path: Path) -> Row:
    try:
        row: Row = json.loads(line)
        if row["problem_id"] == number:
            return row
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"--output {path}: line {number + 1} is not the row of problem {number}; give another file, or --overwrite"
    )
