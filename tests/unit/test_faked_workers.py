"""The benchmarks' faked workers answer what the driver asks, or nobody notices until the benchmark is run."""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from _faked_workers import driver_seconds
from rlinf_lite.config.compose import load
print("seconds:", driver_seconds(load(["data.rollout_batch_size=32"]), 3, 4))
"""


def test_a_driver_takes_its_steps_with_them(run_forked):
    done = run_forked("-c", CODE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition("seconds: ")[2]) > 0.0
