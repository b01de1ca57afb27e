"""The rows of an evaluation on the disk: a line a problem, durable chunk by chunk, and beside them what they are of.

``FILE`` holds the rows, ``FILE.summary.json`` the settings (from the start) and the results (at the end). The same
command goes on after the last whole chunk; another evaluation is refused with what differs.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlinf_lite.config import ConfigError
from rlinf_lite.durable import replace_text

Row = dict[str, Any]


class MemoryLog:
    """Rows of an evaluation that nobody asked to be kept."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def append(self, rows: Sequence[Row]) -> None:
        """The rows of one chunk."""
        self.rows += rows

    def finish(self, results: Mapping[str, Any]) -> None:
        """Nothing to write."""

    def close(self) -> None:
        """Nothing to close."""


class EvalLog(MemoryLog):
    """Rows in ``path``."""

    def __init__(
        self, path: Path, settings: Mapping[str, Any], chunk_sizes: Sequence[int], *, overwrite: bool = False
    ) -> None:
        """
        Args:
            settings: what makes the numbers, as JSON values.
            chunk_sizes: problems in each chunk: rows of a chunk that is not whole are dropped.
            overwrite: begin again, whatever is there.

        Raises:
            ConfigError: ``path`` holds something else, or rows of another evaluation; or is being written.
        """
        super().__init__()
        self.path, self.settings = path, dict(settings)
        self.summary_path = path.with_name(f"{path.name}.summary.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(path)
        try:
            self._go_on(chunk_sizes, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, chunk_sizes: Sequence[int], overwrite: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size and not overwrite:
            self._refuse_another()
            size = self._read_rows(chunk_sizes)
        self._file.truncate(0 if overwrite else size)
        self._write_summary(None)

    def append(self, rows: Sequence[Row]) -> None:
        """Durable when this returns."""
        super().append(rows)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def finish(self, results: Mapping[str, Any]) -> None:
        self._write_summary(dict(results))

    def close(self) -> None:
        self._file.close()

    def _refuse_another(self) -> None:
        remedy = "give another --output, or --overwrite to begin again"
        try:
            before = json.loads(self.summary_path.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"--output {self.path}: is there already, and no {self.summary_path.name} says what it is of; {remedy}"
            ) from None
        changes = [
            f"{key}: {before.get(key, '(absent)')} -> {self.settings.get(key, '(absent)')}"
            for key in sorted(before.keys() | self.settings.keys())
            if before.get(key) != self.settings.get(key)
        ]
        if changes:
            listed = "\n  ".join(changes)
            raise ConfigError(f"--output {self.path}: is of another evaluation:\n  {listed}\n{remedy}")

    def _read_rows(self, chunk_sizes: Sequence[int]) -> int:
        """Take over the rows of all whole chunks; returns where they end."""
        rows: list[Row] = []
        ends = [0]
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # torn by a kill
            rows.append(_row(line, len(rows), self.path))
            ends.append(ends[-1] + len(line))
        num_kept = 0
        for size in chunk_sizes:
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
