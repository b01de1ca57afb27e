"""A run that saves after each of 200 steps: memory stays where it was, and only what is to be kept is there."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.timeout(1800), pytest.mark.soak]


def test_two_hundred_saves(new_run):
    run = new_run({"runner.max_steps": "210", "runner.save_interval": "1", "runner.val_check_interval": "-1"})
    run.finish("runner.checkpoint.keep_last=2")
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if "save/num_bytes" in row]
    assert len(saves) >= 200
    assert run.steps() == [209, 210]
    for key in ("memory/driver_gb", "memory/actor_gb"):  # now resident; the most that ever was
        assert rows[-1][key] <= 1.05 * rows[20][key]
