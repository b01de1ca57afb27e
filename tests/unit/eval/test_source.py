"""Resolving MODEL, and the errors when there is nothing to evaluate."""

from __future__ import annotations

import pytest

from rlinf_lite.checkpoint import DamagedCheckpoint, NoCheckpoint
from rlinf_lite.eval.source import opened


def damage(checkpoint):
    shard = next((checkpoint / "actor").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_kinds(make_run, exported):
    run = make_run([2, 10])
    checkpoints = run / "checkpoints"
    steps = {}
    for model in (run, checkpoints, checkpoints / "global_step_2", exported, "embedded:tiny-arithmetic"):
        with opened(str(model), "full") as source:
            steps[str(model)] = (source.step, source.manifest is not None)
    assert list(steps.values()) == [(10, True), (10, True), (2, True), (0, False), (0, False)]


def test_a_run_is_its_newest_checkpoint_that_verifies(make_run, capsys):
    run = make_run([2, 4])
    damage(run / "checkpoints" / "global_step_4")
    with opened(str(run), "full") as source:
        assert source.step == 2
    assert "stepped over a damaged checkpoint" in capsys.readouterr().out
    damage(run / "checkpoints" / "global_step_2")
    with (
        pytest.raises(DamagedCheckpoint, match=r"none of the 2 checkpoints in .* verifies:\n  .*global_step_4"),
        opened(str(run), "full"),
    ):
        pass


def test_a_damaged_checkpoint_is_refused(make_run):
    checkpoint = make_run([2]) / "checkpoints" / "global_step_2"
    damage(checkpoint)
    with pytest.raises(DamagedCheckpoint, match="blake3"), opened(str(checkpoint), "full"):
        pass


def test_nothing_to_evaluate(tmp_path):
    for model, message in [
        ("Qwen/Qwen3-8B", "no such directory; .*download"),
        (tmp_path, "neither .* give a global_step_N"),
    ]:
        with pytest.raises(NoCheckpoint, match=message), opened(str(model), "full"):
            pass


def test_different_weights_have_different_fingerprints(make_run, exported):
    run = make_run([2, 4])
    found = []
    for model in (run / "checkpoints" / "global_step_2", run, exported, "embedded:tiny-arithmetic"):
        with opened(str(model), "full") as source:
            found.append(source.fingerprint())
    assert len(set(found)) == 4
