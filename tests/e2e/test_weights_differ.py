"""An engine whose weights are not those that the actor sent ends the run: nothing that it sampled with them is used."""

from __future__ import annotations

import pytest

from rlinf_lite.errors import EXIT_USER_ERROR

pytestmark = pytest.mark.timeout(900)


def test_one_flipped_element_of_one_engine_ends_the_run(new_run):
    run = new_run({"cluster.component_placement.rollout": "0-1"})
    fault = {"phase": "rollout.weights", "action": "flip", "step": 2, "rank": 1}
    printed = run.finish(faults=[fault], expect=EXIT_USER_ERROR)
    assert "RolloutGroup rank 1: its engine does not hold the weights after step 2 that the actor sent" in printed
    assert "model.embed_tokens.weight is the first that differs" in printed
    assert "Start the same command again, with runner.resume_dir=auto" in printed
    assert "Traceback" not in printed
    assert run.steps() == [1, 2] and [row["step"] for row in run.rows()] == [1, 2], "nothing was trained on"
