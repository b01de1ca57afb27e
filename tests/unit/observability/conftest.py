"""Fixtures: the metric hub in a process of its own, which is closed, killed, or loses its helper processes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf_lite.config import LoggerConfig

SCRIPT = """
import json, os, psutil, signal, sys, time
from rlinf_lite.config import LoggerConfig
from rlinf_lite.observability import Origin, build_hub

log_path, backends, committed, first, last, end, state, origin = map(json.loads, sys.argv[1:])
config = LoggerConfig(log_path=log_path, project_name="p", experiment_name="e", logger_backends=backends)
hub = build_hub(
    config, committed_step=committed, config_dict={"actor": {"seed": 1}}, num_steps=100, state=state,
    origin=Origin(**origin),
)
for step in range(first, last + 1):
    hub.log(step, {"reward/mean": step / 3, "optim/lr": 1e-4, "progress/step": step})
print("STATE", json.dumps(hub.state()), flush=True)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "lose service":
    for child in psutil.Process().children(recursive=True):
        child.kill()
    time.sleep(0.5)
    hub.log(last + 1, {"reward/mean": (last + 1) / 3})
    hub.log(last + 2, {"reward/mean": (last + 2) / 3})
hub.close()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that can import the package and has no login or settings of wandb."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_") and key != "NETRC"}
    root = str(Path(__file__).parents[3])
    without_packages = {"WANDB__SAVE_REQUIREMENTS": "false"}  # their list takes wandb longest
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": root, **without_packages}


@pytest.fixture
def session(tmp_path: Path, environment: dict[str, str], run_forked) -> Callable[..., str]:
    """Log steps ``first`` to ``last`` in a new process; returns its standard output."""

    def run(
        backend: str, committed: int | None, first: int, last: int, end: str, state=None, origin=None, **changes: str
    ) -> str:
        arguments = [str(tmp_path / "run"), [backend], committed, first, last, end, state, origin or {}]
        done = run_forked("-c", SCRIPT, *map(json.dumps, arguments), env=environment | changes)
        assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
        return done.stdout

    return run


@pytest.fixture
def logger_config(tmp_path: Path) -> LoggerConfig:
    return LoggerConfig(log_path=str(tmp_path / "run"), project_name="p", experiment_name="e", logger_backends=[])
