"""Whole runs with FSDP1: killed and resumed bit for bit, and resumed with the other strategy."""

from __future__ import annotations

import shutil

import pytest
import torch

from rlinf_lite.checkpoint.formats.read_state import read_tensors

pytestmark = pytest.mark.timeout(900)

KEY = "actor.fsdp_config.strategy"
AUTO = "runner.resume_dir=auto"


def settings(strategy: str) -> dict[str, str]:
    return {"runner.max_steps": "2", "runner.val_check_interval": "-1", KEY: strategy}


@pytest.fixture
def straight(undisturbed):
    """2 steps on 2 ranks, by strategy."""
    return lambda strategy: undisturbed(strategy, settings(strategy))


@pytest.mark.soak  # shorter: tests/distributed/training/test_trainer_resume.py
def test_killed_and_resumed(straight, new_run, same_run):
    run = new_run(settings("fsdp"))
    run.kill_when("step    2/2", faults=[{"phase": "save.manifest", "step": 2, "action": "hang"}])
    assert run.steps() == [1]
    assert "resumed from global_step_1" in run.finish(AUTO)
    same_run(straight("fsdp"), run, 2)


@pytest.mark.soak  # shorter, and exact: test_either_strategy_loads_the_same_state
@pytest.mark.parametrize(("before", "after"), [("fsdp", "fsdp2"), ("fsdp2", "fsdp")])
def test_resumed_with_the_other_strategy(straight, new_run, before, after):
    source, run = straight(before), new_run(settings(after))
    shutil.copytree(source.checkpoints / "global_step_1", run.checkpoints / "global_step_1")
    run.finish(AUTO, f"runner.resume_allow_changes=[{KEY}]")
    assert run.steps() == [1, 2] and [row["step"] for row in run.rows()] == [2]
    assert run.samples() == [row for row in source.samples() if row["step"] == 2], "the engine had the same weights"
    one, other = (read_tensors(made.checkpoints / "global_step_2/actor") for made in (source, run))
    for name in (name for name in one if not name.startswith("rng.")):
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-7)


NO_UPDATE = {"actor.optim.lr": "0.0", "actor.optim.min_lr": "0.0", "actor.optim.clip_grad": "1e-30"}
"""Gradients vanish beside the optimizer state, and no weight moves: the next checkpoint shows what was loaded."""


@pytest.mark.soak  # shorter: test_either_loads_what_the_other_wrote in tests/distributed/training/test_fsdp1.py
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_either_strategy_loads_the_same_state(straight, new_run, strategy):
    """Weights and optimizer state of a run with FSDP1, bit for bit."""
    source, run = straight("fsdp"), new_run(settings(strategy) | NO_UPDATE)
    shutil.copytree(source.checkpoints / "global_step_1", run.checkpoints / "global_step_1")
    run.finish(AUTO, f"runner.resume_allow_changes=[{','.join([KEY, *NO_UPDATE])}]")
    loaded, saved = (read_tensors(made.checkpoints / f"global_step_{n}/actor") for made, n in ((source, 1), (run, 2)))
    weights = [name for name in loaded if name.startswith("model.")]
    assert weights and all(torch.equal(saved[name], loaded[name]) for name in weights)
    first, second = ([name for name in loaded if name.endswith(end)] for end in (".exp_avg", ".exp_avg_sq"))
    assert first and all(torch.equal(saved[name], loaded[name].lerp(torch.zeros(()), 0.1)) for name in first)
    assert second and all(torch.equal(saved[name], loaded[name] * 0.95) for name in second)
