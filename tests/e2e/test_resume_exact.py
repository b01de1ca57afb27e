"""The promise: killed anywhere and started again, a run ends in the bits of the run that was never killed."""

from __future__ import annotations

import shutil
import signal

import psutil
import pytest

# An epoch is 3 steps of these runs: 2 is inside the first, 3 its end, 5 inside the second.
KILLS = (2, 3, 5)
ONE_ROLLOUT = {"cluster.component_placement.rollout": "0"}
TWO_ROLLOUTS = {"cluster.component_placement.rollout": "0-1"}
ONE_ACTOR = {"cluster.component_placement.actor": "0"}
THREE_ACTORS = {"cluster.component_placement.actor": "0-2"}


@pytest.fixture(scope="module")
def straight(module_run):
    """2 actor ranks, 1 rollout worker, never killed."""
    run = module_run("straight", ONE_ROLLOUT)
    run.finish()
    return run


def test_driver_killed_three_times_with_two_rollout_workers_and_the_other_weight_road(straight, new_run, same_run):
    run = new_run({**TWO_ROLLOUTS, "cluster.weight_sync": "collective"})
    for step in KILLS:
        run.kill_when(f"global_step_{step} (", "runner.resume_dir=auto")
    printed = run.finish("runner.resume_dir=auto")
    assert "resumed from global_step_5" in printed
    same_run(straight, run, 8)


def test_workers_killed_and_interrupted(straight, new_run, same_run):
    run = new_run(ONE_ROLLOUT)
    printed = run.finish(faults=[{"phase": "save.manifest", "step": 3, "action": "kill"}], expect=3)
    assert "ActorGroup rank 0 was lost" in printed and "Traceback" not in printed
    assert "runner.resume_dir=auto" in printed
    assert sorted(path.name for path in run.checkpoints.glob("global_step_?")) == ["global_step_1", "global_step_2"]

    process = run.start("runner.resume_dir=auto")
    assert "resumed from global_step_2" in run.read_until(process, "global_step_4 (")
    victims = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_rollout_worker(p)]
    assert len(victims) == 1
    victims[0].send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and "RolloutGroup rank 0 was lost" in printed, printed

    process = run.start("runner.resume_dir=auto")
    run.read_until(process, "global_step_6 (")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed, printed

    run.finish("runner.resume_dir=auto")
    same_run(straight, run, 8)


def _is_rollout_worker(process: psutil.Process) -> bool:
    return "ray::RolloutGroup" in " ".join(process.cmdline())


def test_one_actor_rank_and_a_full_disk(new_run, same_run):
    one = new_run({**ONE_ACTOR, **ONE_ROLLOUT})
    printed = one.finish(faults=[{"phase": "save.data", "step": 2, "action": "ENOSPC"}])
    assert "SAVE FAILED" in printed and "No space left on device" in printed
    assert not (one.checkpoints / "global_step_2").exists() and (one.checkpoints / "global_step_3").exists()

    two = new_run({**ONE_ACTOR, **TWO_ROLLOUTS})
    two.kill_when("global_step_4 (")
    two.finish("runner.resume_dir=auto")
    same_run(one, two, 8)


@pytest.mark.parametrize("actors", [ONE_ACTOR, THREE_ACTORS], ids=["one rank", "three ranks"])
def test_another_number_of_actor_ranks(straight, new_run, actors):
    run = new_run({**actors, **ONE_ROLLOUT})
    shutil.copytree(straight.checkpoints / "global_step_4", run.checkpoints / "global_step_4")
    given = f"runner.resume_dir={run.checkpoints / 'global_step_4'}"
    printed = run.finish(given, "runner.max_steps=5", "runner.resume_allow_changes=[actor.optim.total_training_steps]")
    assert "saved by 2 actor ranks" in printed
    # The weights are the same, the prompts and the noise too: so are the tokens of the first step after the resume.
    assert run.samples() == [row for row in straight.samples() if row["step"] == 5]


@pytest.mark.soak
@pytest.mark.parametrize("num_rollouts", [ONE_ROLLOUT, TWO_ROLLOUTS], ids=["1 rollout", "2 rollouts"])
@pytest.mark.parametrize("actors", [ONE_ACTOR, {"cluster.component_placement.actor": "0-1"}], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("step", KILLS)
def test_every_topology(step, actors, num_rollouts, new_run, same_run):
    settings = {**actors, **num_rollouts}
    straight, killed = new_run(settings), new_run(settings)
    straight.finish()
    killed.kill_when(f"global_step_{step} (")
    killed.finish("runner.resume_dir=auto")
    same_run(straight, killed, 8)
