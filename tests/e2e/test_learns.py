"""The embedded default learns, within 90 seconds of its first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE

pytestmark = pytest.mark.timeout(900)

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "learn.py"


@pytest.mark.soak  # its first steps, bit for bit: test_recorded_numbers.py
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_above_nine_tenths(seed, forks):
    """In the first 30 of its 100 steps, with their learning rates."""
    steps = "runner.max_steps=30", "actor.optim.total_training_steps=100"
    command = [sys.executable, BENCHMARK, "cluster.warm_spares=0", *steps, "--seeds", str(seed)]
    environment = {**os.environ, TEMPLATE_VARIABLE: forks.name}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    columns = shown.stdout.splitlines()[-1].split()
    assert float(columns[1]) < 0.45 and float(columns[3]) < 90
