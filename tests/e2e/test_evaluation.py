"""A checkpoint evaluated by itself answers as its run's validation did."""

from __future__ import annotations

import json

import pytest

from rlinf_lite.eval.__main__ import main

pytestmark = pytest.mark.timeout(900)


def test_greedy_accuracy_is_the_runs_own(straight, capsys):
    validated = {row["step"]: row["val/accuracy"] for row in straight.rows() if "val/accuracy" in row}
    assert sorted(validated) == [4, 8]
    for step, accuracy in validated.items():
        capsys.readouterr()
        assert main([str(straight.checkpoints / f"global_step_{step}"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy
