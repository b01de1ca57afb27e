"""The promise: killed anywhere and started again, a run ends in the bits of the run that was never killed."""

from __future__ import annotations

import shutil
import signal

import psutil
import pytest

pytestmark = pytest.mark.timeout(900)  # several whole runs a test

# An epoch is 3 steps of these runs: 2 is inside the first, 3 its end, 5 inside the second.
KILLS = (2, 3, 5)
TWO_ROLLOUTS = {"cluster.component_placement.rollout": "0-1"}
ONE_ACTOR = {"cluster.component_placement.actor": "0"}
TWO_ACTORS = {"cluster.component_placement.actor": "0-1"}
THREE_ACTORS = {"cluster.component_placement.actor": "0-2"}
AUTO = "runner.resume_dir=auto"


def test_everything_killed_in_turn(straight, new_run, same_run):
    """Against 1 rollout worker over the object store, never killed: 2 workers over the broadcast, killed five times."""
    run = new_run({**TWO_ROLLOUTS, "cluster.weight_sync": "collective"})
    run.kill_when("global_step_2 (")

    printed = run.finish(AUTO, faults=[{"phase": "save.manifest", "step": 4, "action": "kill"}], expect=3)
    assert "resumed from global_step_2" in printed and "Traceback" not in printed
    assert "ActorGroup rank 0 was lost" in printed and AUTO in printed
    assert max(path.name for path in run.checkpoints.glob("global_step_?")) == "global_step_3"

    process = run.start(AUTO)
    assert "resumed from global_step_3" in run.read_until(process, "global_step_5 (")
    next(filter(_is_rollout_worker, psutil.Process(process.pid).children(recursive=True))).kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 3 and "RolloutGroup rank" in printed and "was lost" in printed, printed

    process = run.start(AUTO)
    assert "resumed from global_step_5" in run.read_until(process, "global_step_6 (")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed, printed

    run.finish(AUTO)
    same_run(straight, run, 8)


def _is_rollout_worker(process: psutil.Process) -> bool:
    return "ray::RolloutGroup" in " ".join(process.cmdline())


def test_one_actor_rank_a_full_disk_and_the_epoch_boundary(new_run, same_run):
    one = new_run(ONE_ACTOR)
    printed = one.finish(faults=[{"phase": "save.data", "step": 2, "action": "ENOSPC"}])
    assert "SAVE FAILED" in printed and "No space left on device" in printed
    assert not (one.checkpoints / "global_step_2").exists() and (one.checkpoints / "global_step_3").exists()

    two = new_run({**ONE_ACTOR, **TWO_ROLLOUTS})
    two.kill_when("global_step_3 (")
    two.finish(AUTO)
    same_run(one, two, 8)


@pytest.mark.parametrize(
    "actors", [THREE_ACTORS, pytest.param(ONE_ACTOR, marks=pytest.mark.soak)], ids=["three ranks", "one rank"]
)
def test_another_number_of_actor_ranks(straight, new_run, actors):
    run = new_run(actors)
    shutil.copytree(straight.checkpoints / "global_step_4", run.checkpoints / "global_step_4")
    given = f"runner.resume_dir={run.checkpoints / 'global_step_4'}"
    printed = run.finish(given, "runner.max_steps=5", "runner.resume_allow_changes=[actor.optim.total_training_steps]")
    assert "saved by 2 actor ranks" in printed
    # The weights are the same, the prompts and the noise too: so are the tokens of the first step after the resume.
    assert run.samples() == [row for row in straight.samples() if row["step"] == 5]


@pytest.mark.soak
@pytest.mark.parametrize("rollouts", [{}, TWO_ROLLOUTS], ids=["1 rollout", "2 rollouts"])
@pytest.mark.parametrize("actors", [ONE_ACTOR, TWO_ACTORS], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("step", KILLS)
def test_every_topology(step, actors, rollouts, new_run, same_run):
    straight, killed = new_run({**actors, **rollouts}), new_run({**actors, **rollouts})
    straight.finish()
    killed.kill_when(f"global_step_{step} (")
    killed.finish(AUTO)
    same_run(straight, killed, 8)
