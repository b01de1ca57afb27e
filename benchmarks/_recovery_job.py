"""One job of the recovery benchmark: starts it, kills its workers one by one, and times the next step."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

SETTINGS = {
    "runner.resume_dir": "auto",
    "runner.max_steps": "100000",
    "runner.save_interval": "10",
    "runner.val_check_interval": "-1",
    "runner.checkpoint.keep_last": "2",
    "data.arithmetic.num_problems": "64",
    "data.rollout_batch_size": "8",
    "algorithm.group_size": "4",
    "algorithm.training_batch_size_per_gpu": "8",
    "rollout.max_running_requests": "16",
    "actor.optim.lr_scheduler": "constant",
    "cluster.component_placement.actor": "0-1",
    "cluster.component_placement.rollout": "0-1",
    "cluster.component_placement.reward": "0",
    "cluster.warm_spares": "1",
}
_STEP = re.compile(r"step +(\d+)/\d+ ")
_RECOVERED = re.compile(r"recovered in ([\d.]+) s(?:: (.*))?$")
_PART = re.compile(r"([a-z][a-z ]*?) ([\d.]+)(?: s)?(?:,|;|$)")
_NAMES = {"actor": "ray::ActorGroup", "rollout": "ray::RolloutGroup", "reward": "ray::RewardGroup"}
_MOST_RESTARTS = 20
_NOTICE_SECONDS = 1.0
_LIMIT = 240.0


class JobError(RuntimeError):
    """The job did not do what is to be measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """From one kill to the next completed step."""

    seconds: float
    """As seen from outside: from the kill to the line of the next step."""
    told: float | None
    """The duration that the job logs; None if it logs none."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by phase: ``detect`` is from the kill to its log line; the others are logged by the job."""
    steps_lost: int
    """Completed steps that had to be done again."""
    restarts: int
    """Of the whole command, because the driver ended."""


@dataclass(frozen=True, slots=True)
class _Line:
    at: float
    text: str


class Job:
    """A command that trains until it is killed."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        """Start it, cold."""
        self._directory = root / "recovery"
        settings = {**settings, "runner.output_dir": str(root), "runner.experiment_name": self._directory.name}
        self._command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *(f"{k}={v}" for k, v in settings.items())]
        self._printed: list[str] = []
        self._step = self._restarts = 0
        self._notice: re.Match[str] | None = None
        self._lost_at: float | None = None
        self._start()

    def _start(self) -> None:
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "RAY_ADDRESS": "local"},
        )
        self._lines: queue.SimpleQueue[_Line | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[_Line | None]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            lines.put(_Line(time.perf_counter(), text.rstrip("\n")))
        lines.put(None)

    def end(self) -> None:
        """Kill it, and what runs below it."""
        tree = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.kill()
        for process in tree:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(timeout=60)

    def cold_start(self) -> float:
        """Seconds from the start of the process to the line of its first step."""
        return self._next_step().at - self.started

    def train(self, seconds: float) -> None:
        """Let it run for ``seconds``; returns right after the line of a step."""
        until = time.perf_counter() + seconds
        while self._next_step().at < until:
            pass

    def step_seconds(self, num_steps: int) -> float:
        """The median of so many steps."""
        at = [self._next_step().at for _ in range(num_steps + 1)]
        return median(after - before for before, after in pairwise(at))

    def recover(self, group: str, rank: int, delay: float) -> Recovery:
        """Kill a worker ``delay`` seconds after the line of a step, and wait for the next step.

        Raises:
            JobError: there is no such worker, or no next step.
        """
        victim = self._victim(group, rank)
        time.sleep(delay)
        killed, restarts, self._notice, self._lost_at = time.perf_counter(), self._restarts, None, None
        os.kill(victim, signal.SIGKILL)
        done, line = self._step, self._next_step()
        while line.at <= killed:  # it was on its way
            done, line = self._step, self._next_step()
        told = self._told()
        return Recovery(
            seconds=line.at - killed,
            told=float(told[1]) if told else None,
            parts=({"detect": self._lost_at - killed} if self._lost_at is not None else {})
            | ({name: float(value) for name, value in _PART.findall(told[2] or "")} if told else {}),
            steps_lost=done + 1 - self._step,
            restarts=self._restarts - restarts,
        )

    def _told(self) -> re.Match[str] | None:
        """The job's log line about its recovery, just before or after the line of the step."""
        until = time.perf_counter() + _NOTICE_SECONDS
        while self._notice is None and time.perf_counter() < until:
            self._hear(until - time.perf_counter())
        return self._notice

    def _next_step(self) -> _Line:
        """The line of the next step, whatever stands before it; starts the command again if it ends."""
        until = time.perf_counter() + _LIMIT
        while (left := until - time.perf_counter()) > 0:
            line = self._hear(left)
            if line is not None and _STEP.match(line.text):
                return line
        raise JobError(f"no step in {_LIMIT:.0f} s; the last lines:\n" + "\n".join(self._printed[-20:]))

    def _hear(self, seconds: float) -> _Line | None:
        """The next line, if one comes in time."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if line is None:
            self._again()
            return None
        self._printed.append(line.text)
        if step := _STEP.match(line.text):
            self._step = int(step[1])
        if " was lost: " in line.text and self._lost_at is None:
            self._lost_at = line.at
        self._notice = _RECOVERED.search(line.text) or self._notice
        return line

    def _again(self) -> None:
        """As a scheduler does when the driver has ended."""
        code = self._process.wait(timeout=60)
        self._restarts += 1
        if code in (0, 2) or self._restarts > _MOST_RESTARTS:
            raise JobError(f"the job ended with {code}; the last lines:\n" + "\n".join(self._printed[-20:]))
        self._start()

    def _victim(self, group: str, rank: int) -> int:
        """The worker's process id, from the job's ``workers.json``, or else by the name of the process."""
        listed = self._directory / "workers.json"
        if listed.exists():
            workers = json.loads(listed.read_text())["workers"]
            found = {worker["rank"]: worker["pid"] for worker in workers if worker["group"] == group}
        else:
            below = psutil.Process(self._process.pid).children(recursive=True)
            named = sorted(each.pid for each in below if " ".join(each.cmdline()).startswith(_NAMES[group]))
            found = dict(enumerate(named))
        if not found:
            raise JobError(f"no {group} worker is running")
        return found[rank % len(found)]
