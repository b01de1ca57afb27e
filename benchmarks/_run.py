"""A run of the embedded default in a process of its own, as a user starts it, read line by line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

STEP = re.compile(r"step +(\d+)/")
_KEPT_LINES = 40


class Run:
    """The command ``python -m rlinf_lite.main_math`` with a Ray of its own; ended, with all it started, on leaving."""

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        """
        Args:
            directory: becomes the run's, with its logs and checkpoints.
            settings: hydra overrides.
        """
        names = {"runner.output_dir": directory.parent, "runner.experiment_name": directory.name}
        overrides = [f"{key}={value}" for key, value in {**settings, **names}.items()]
        environment = {**os.environ, "RAY_ADDRESS": "local"}
        self.lines: list[str] = []
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlinf_lite.main_math", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def until(self, pattern: re.Pattern[str]) -> tuple[float, re.Match[str]]:
        """Wait for a line that begins with ``pattern``; return the seconds since the start, and the match.

        Raises:
            RuntimeError: the run ended before; with its last lines.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if found := pattern.match(line):
                return time.monotonic() - self.began, found
        raise RuntimeError("the run ended early:\n" + "\n".join(self.lines[-_KEPT_LINES:]))

    def processes(self) -> list[psutil.Process]:
        """Those that the run has now: parent, driver, Ray, workers."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self) -> None:
        """Ask the run to save and end; return when it has."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()

    def wait(self) -> None:
        """Return when the run has ended by itself.

        Raises:
            RuntimeError: it has failed.
        """
        rest, _ = self._process.communicate()
        self.lines += rest.splitlines()
        if self._process.returncode != 0:
            raise RuntimeError(f"exit code {self._process.returncode}:\n" + "\n".join(self.lines[-_KEPT_LINES:]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
                self._process.send_signal(signal.SIGTERM)
            self._process.communicate()
