"""A whole run in real processes: started as a user starts it, killed as a cluster kills it, compared as bits."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import pytest

from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE, ForkServer
from rlinf_lite.cluster.forks.environment import worker_env

SHARED_TEMPLATE = "RLINF_LITE_TEST_FORK_SERVER"
"""Names the fork server of the whole test session, from which those of test processes branch."""

# 24 problems, 8 per step: an epoch is 3 steps. No spare worker process: only tests of recovery have a use for one.
TINY = {
    "runner.max_steps": "8",
    "runner.save_interval": "1",
    "runner.val_check_interval": "4",
    "runner.logger.log_rollouts": "-1",
    "data.arithmetic.num_problems": "24",
    "data.arithmetic.num_val_problems": "8",
    "data.rollout_batch_size": "8",
    "algorithm.group_size": "4",
    "algorithm.training_batch_size_per_gpu": "8",
    "rollout.max_running_requests": "16",
    "cluster.warm_spares": "0",
}
_END_SECONDS = 600
"""After which a run counts as hanging. On a quiet machine it ends within 30 s."""
ForkedProcess = runpy.run_path(str(Path(__file__).with_name("forked_run.py")))["ForkedProcess"]
Process = subprocess.Popen[str] | ForkedProcess
_SECONDS = ("time/", "throughput/", "memory/", "save/")


@functools.cache
def template_server() -> ForkServer:
    """A fork server for all runs of this test process; it ends with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TEMPLATE_VARIABLE, os.environ.get(SHARED_TEMPLATE, ""))
        return ForkServer(worker_env(1, "cpu"))


@dataclass
class Run:
    """One run's directory, over as many processes as it takes."""

    root: Path
    overrides: dict[str, str]
    processes: list[Process] = field(default_factory=list, compare=False)
    context: BaseContext | None = None
    """Of the fork server from which parent and driver are forked, and workers from that of this test process. None: as
    by a user, by running Python; the driver starts a fork server of its own."""

    @property
    def directory(self) -> Path:
        return self.root / "grpo-tiny-arithmetic"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def arguments(self, *extra: str) -> list[str]:
        settings = {**TINY, **self.overrides, "runner.output_dir": str(self.root)}
        return [*(f"{key}={value}" for key, value in settings.items()), *extra]

    def start(self, *extra: str, faults: list[dict] | None = None) -> Process:
        command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *self.arguments(*extra)]
        env = {**os.environ, "RAY_ADDRESS": os.environ.get("RLINF_LITE_TEST_RAY", "local")}
        if self.context is not None:
            env[TEMPLATE_VARIABLE] = template_server().name
        if faults:
            env["RLINF_LITE_FAULTS"] = json.dumps(faults)
        process: Process
        if self.context is None:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        else:
            process = ForkedProcess(self.context, command, env)
        self.processes.append(process)
        return process

    def hold(self, step: int) -> dict:
        """A fault: the run hangs in the rollout of ``step``, once, lest it be over before a test that waits for the
        processor has killed anything. After the kill call `let_go`: a run that was killed earlier must not hang."""
        self._held.parent.mkdir(parents=True, exist_ok=True)
        self._held.touch()
        return {"phase": "rollout.train", "step": step, "rank": 0, "action": "hang", "armed": str(self._held)}

    def let_go(self) -> None:
        self._held.unlink(missing_ok=True)

    @property
    def _held(self) -> Path:
        return self.root / "held"

    def end(self) -> None:
        """Leave no run behind, whatever a test died of: the driver and its workers end with the parent."""
        for process in self.processes:
            process.kill()
            process.wait(timeout=60)

    def finish(self, *extra: str, faults: list[dict] | None = None, expect: int = 0) -> str:
        """Run to the end; returns what was printed."""
        process = self.start(*extra, faults=faults)
        printed, _ = process.communicate(timeout=_END_SECONDS)
        assert process.returncode == expect, f"exit code {process.returncode}\n{printed}"
        return printed

    def read_until(self, process: Process, text: str) -> str:
        """What the process prints up to the line with ``text``."""
        printed = ""
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if text in line:
                return printed
        raise AssertionError(f"{text!r} never came:\n{printed}")

    def kill_when(self, text: str, *extra: str, faults: list[dict] | None = None) -> str:
        """kill -9 parent and driver as soon as ``text`` is printed; returns what was printed until then."""
        process = self.start(*extra, faults=faults)
        printed = self.read_until(process, text)
        driver = self.driver(process)
        process.kill()
        driver.kill()
        process.wait(timeout=60)
        return printed

    def driver(self, process: Process) -> psutil.Process:
        """The driver that ``process``, the parent, runs now."""
        while True:
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if child.name() == "driver" or "rlinf_lite.driver" in child.cmdline():
                        return child
            time.sleep(0.01)

    def below(self, process: Process) -> list[psutil.Process]:
        """All processes of the run below ``process``, the parent, and workers that a template has forked for it."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid).children(recursive=True)
        names = {f"forks-{child.pid}" for child in found}
        for server in psutil.process_iter() if names else ():
            with suppress(psutil.NoSuchProcess):
                if server.name() in names:
                    found += [server, *server.children()]
        return found

    def steps(self) -> list[int]:
        """Of the committed checkpoints."""
        from rlinf_lite.checkpoint import layout

        return sorted(layout.step_of(path) or 0 for path in layout.committed(self.checkpoints))

    def rows(self) -> list[dict]:
        """Metric rows without seconds, speeds, memory and which save had ended by then."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(_SECONDS)} for line in lines]

    def samples(self) -> list[dict]:
        """Prompts and generated token ids of every step."""
        return [json.loads(line) for line in (self.directory / "rollouts.jsonl").read_text().splitlines()]

    def digest(self, step: int) -> str:
        """sha256 of the parameters, optimizer state and counters in a checkpoint, without the RNG state."""
        return self._digest(step, lambda name: not name.startswith("rng."), holds="exp_avg_sq")

    def rng_digest(self, step: int) -> str:
        return self._digest(step, lambda name: name.startswith("rng."), holds="")

    def _digest(self, step: int, wanted: Callable[[str], bool], *, holds: str) -> str:
        """Of all sections: ``actor/model...``; one of the names must end with ``holds``."""
        from rlinf_lite.checkpoint.digest import state_digest
        from rlinf_lite.checkpoint.formats.read_state import read_tensors

        sections = sorted(path.parent for path in (self.checkpoints / f"global_step_{step}").glob("*/.metadata"))
        read = {section.name: read_tensors(section, wanted) for section in sections}
        tensors = {f"{section}/{name}": tensor for section, held in read.items() for name, tensor in held.items()}
        assert any(name.endswith(holds) for name in tensors)
        return state_digest(tensors)

    def data_digest(self, step: int) -> str:
        return hashlib.sha256((self.checkpoints / f"global_step_{step}" / "data" / "data.pt").read_bytes()).hexdigest()
