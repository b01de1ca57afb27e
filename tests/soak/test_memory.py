"""No process of a run grows with the number of its steps; `benchmarks/memory.py` measures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_three_thousand_steps(tmp_path):
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    rows = dict(memory.measure(3000, 250, str(tmp_path), []))
    assert {"driver", "gcs_server", "raylet", "actor", "rollout", "reward"} <= rows[3000].keys()
    growth = memory.growth(rows)  # kB per step; it was 35 for the GCS with Ray's task events
    assert growth["gcs_server"] < 2 and max(growth.values()) < 6, growth  # a worker may take some MB once
