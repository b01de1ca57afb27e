"""The job that is killed: its command, its directory, and what each of its driver processes printed, and when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# 24 problems, 8 per step: an epoch is 3 steps. About 7 s of steps, saves and validation after the start.
SETTINGS = {
    "runner.max_restarts": "1000",
    "runner.resume_dir": "auto",  # from the first start on: what a scheduler starts again is the same command
    "runner.max_steps": "30",
    "runner.save_interval": "1",
    "runner.val_check_interval": "6",
    "runner.logger.log_rollouts": "-1",
    "data.arithmetic.num_problems": "24",
    "data.arithmetic.num_val_problems": "8",
    "data.rollout_batch_size": "8",
    "algorithm.group_size": "4",
    "algorithm.training_batch_size_per_gpu": "8",
    "rollout.max_running_requests": "16",
    "cluster.component_placement.actor": "0-1",
    "cluster.component_placement.rollout": "0-1",
    "cluster.component_placement.reward": "0",
}
_STEP = re.compile(r"step +(\d+)/(\d+) ")
_BEGINS = re.compile(r"run: .*; starting \.\.\.$")
EQUAL_DEATHS = re.compile(r"error: this happened 3 times in a row with (\d+) steps completed")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLine:
    step: int
    at: float
    """By ``time.monotonic()``."""


Begin = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen[str]]
"""Starts a command with these environment variables; what it prints can be read."""


def begin(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start it as a user does."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
    )


class Launch:
    """One command: a parent process and its drivers, from its start to its end."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        """
        Args:
            process: the parent, which has just been started.
            output: everything printed is appended there.
        """
        self.started = time.monotonic()
        """When its newest driver was started."""
        self.ended: float | None = None
        self.steps: list[StepLine] = []
        self.given_up: int | None = None
        """How many steps were completed when the restart budget found three equal deaths; None if it did not."""
        self._begins = 0
        self._first = 0
        self._process = process
        self.process = psutil.Process(self._process.pid)
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: Path) -> None:
        assert self._process.stdout is not None
        began = self.started
        with output.open("a") as file:
            print(f"--- process {self._process.pid}", file=file, flush=True)
            for line in self._process.stdout:
                now = time.monotonic()
                print(f"{now - began:7.2f}  {line}", end="", file=file, flush=True)
                if match := _STEP.match(line):
                    self.steps.append(StepLine(step=int(match[1]), at=now))
                elif _BEGINS.match(line):
                    self._begin(now)
                elif match := EQUAL_DEATHS.match(line):
                    self.given_up = int(match[1])

    def _begin(self, now: float) -> None:
        self._begins += 1
        if self._begins > 1:
            self.started, self._first = now, len(self.steps)

    @property
    def driver(self) -> psutil.Process | None:
        """The driver that runs now; None between two of them, and once the parent is gone."""
        for child in descendants(self.process, children_only=True):
            with suppress(psutil.NoSuchProcess):
                if child.name() == "driver" or "rlinf_lite.driver" in child.cmdline():
                    return child
        return None

    @property
    def lines(self) -> list[StepLine]:
        """Of its newest driver."""
        return self.steps[self._first :]

    def poll(self) -> int | None:
        """The exit code, once the process is gone."""
        code = self._process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
            self._reader.join(timeout=5)  # a process left behind may hold the pipe open: its lines are not waited for
        return code

    def kill(self) -> None:
        """End parent and driver, and whatever runs below them."""
        for process in [*descendants(self.process), self.process]:
            kill(process)
        self._process.wait(timeout=60)
        self.poll()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run's directory and command, over as many processes as it takes."""

    root: Path
    settings: Mapping[str, str]
    begin: Begin = begin
    ranks_of: Callable[[int], int] | None = None
    """How many actor ranks the command has when it is started for the n-th time, from 0; None: as set."""

    @property
    def directory(self) -> Path:
        """Where metrics, rollouts, checkpoints and ``workers.json`` are."""
        return self.root / "chaos"

    @property
    def output(self) -> Path:
        return self.root / "output.txt"

    @property
    def last_step(self) -> int:
        return int(self.settings["runner.max_steps"])

    def start(self, joining: Mapping[str, str], number: int) -> Launch:
        """Start the command, which is the same each time, except for the number of ranks.

        Args:
            joining: environment variables that say which Ray cluster to join, or that the driver has one of its own.
            number: how often it was started before.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        settings = {**self.settings, "runner.output_dir": str(self.root), "runner.experiment_name": "chaos"}
        if self.ranks_of is not None:
            settings["cluster.component_placement.actor"] = f"0-{self.ranks_of(number) - 1}"
        command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *(f"{k}={v}" for k, v in settings.items())]
        return Launch(self.begin(command, {**os.environ, **joining}), self.output)


def descendants(process: psutil.Process, *, children_only: bool = False) -> list[psutil.Process]:
    """Every process below; none if it is gone."""
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=not children_only)
    return []


def kill(process: psutil.Process) -> bool:
    """kill -9; whether there was something left to kill."""
    with suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
            return True
    return False
