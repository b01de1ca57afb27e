"""The promise: killed anywhere and started again, a run ends in the bits of the run that was never killed."""

from __future__ import annotations

import runpy
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from rlinf_lite.errors import EXIT_OUT_OF_TIME

pytestmark = pytest.mark.timeout(900)  # several whole runs a test

# An epoch is 3 steps of these runs: 2 is inside the first, 3 its end, 5 inside the second.
KILLS = (2, 3, 5)
TWO_ROLLOUTS = {"cluster.component_placement.rollout": "0-1"}
ONE_ACTOR = {"cluster.component_placement.actor": "0"}
TWO_ACTORS = {"cluster.component_placement.actor": "0-1"}
THREE_ACTORS = {"cluster.component_placement.actor": "0-2"}
AUTO = "runner.resume_dir=auto"
ALGORITHMS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "algorithms.py"))["ALGORITHMS"]
FAILS = f"{Path(__file__).with_name('reward_that_fails.py')}:score"
UNGRADED = {
    "reward.reward_type": "math",
    "reward.functions": f"[{{name: correct, reward_type: custom, path: '{FAILS}'}}, "
    "{name: ended, reward_type: exact, weight: -0.25}]",
    "algorithm.normalize_advantages": "true",
}


@pytest.mark.soak
def test_everything_killed_in_turn(straight, new_run, same_run):
    """Against 1 rollout worker over the object store, never ended: 2 workers over the broadcast, ended four times."""
    run = new_run({**TWO_ROLLOUTS, "cluster.weight_sync": "collective"})
    # The save of step 3 never ends, and the driver dies while it is in flight: steps 3 and 4 have to be done again.
    run.kill_when("step    4/8", faults=[{"phase": "save.manifest", "step": 3, "action": "hang"}])
    assert run.steps() == [1, 2] and len(run.rows()) == 4

    once = "runner.max_restarts=0"
    printed = run.finish(AUTO, once, faults=[{"phase": "save.manifest", "step": 4, "action": "kill"}], expect=3)
    assert "resumed from global_step_2" in printed and "Traceback" not in printed
    assert "removed 1 unfinished save(s) of a killed run" in printed
    assert "ActorGroup rank 0 was lost" in printed and AUTO in printed
    assert run.steps() == [1, 2, 3]

    process = run.start(AUTO, once, "runner.checkpoint.mode=sync")
    assert "resumed from global_step_3" in run.read_until(process, "global_step_5 (")
    next(filter(_is_rollout_worker, run.below(process))).kill()
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 3 and "RolloutGroup rank" in printed and "was lost" in printed, printed

    printed = run.finish(AUTO, "runner.max_time=00:00:01", expect=EXIT_OUT_OF_TIME)
    assert "resumed from global_step_5" in printed and "stopped by runner.max_time: 6 of 8 steps" in printed
    assert run.steps() == [1, 2, 3, 4, 5, 6]

    printed = run.finish(AUTO, "runner.checkpoint.keep_last=2", "runner.checkpoint.keep_every=3")
    assert "removed global_step_1, global_step_2, global_step_4, global_step_5" in printed
    assert run.steps() == [3, 6, 7, 8]
    same_run(straight, run, 8)


def _is_rollout_worker(process: psutil.Process) -> bool:
    return "ray::RolloutGroup" in " ".join(process.cmdline())


@pytest.mark.soak
def test_one_actor_rank_a_full_disk_and_the_epoch_boundary(new_run, same_run):
    """With two reward functions, one of which leaves some responses without a grade."""
    one = new_run({**ONE_ACTOR, **UNGRADED})
    printed = one.finish(faults=[{"phase": "save.data", "step": 2, "action": "ENOSPC"}])
    assert "SAVE FAILED" in printed and "No space left on device" in printed
    assert not (one.checkpoints / "global_step_2").exists() and (one.checkpoints / "global_step_3").exists()

    two = new_run({**ONE_ACTOR, **TWO_ROLLOUTS, **UNGRADED})
    process = two.start()
    two.read_until(process, "global_step_3 (")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed, printed
    assert not list(two.checkpoints.glob("*.tmp-*"))  # the save in flight was waited for

    process = two.start(AUTO, "runner.save_interval=-1")
    first = max(two.steps()) + 1
    two.read_until(process, f"resumed from global_step_{first - 1}")
    process.send_signal(signal.SIGUSR2)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "): on SIGUSR2" in printed, printed
    assert two.steps() == [*range(1, first + 1), 8]
    same_run(one, two, 8)
    assert sum(row["reward/ungraded"] for row in one.rows()) > 0 and "could not be graded; the first: " in printed
    assert all((row["reward"] is None) == (row["error"] is not None) for row in one.samples())
    for row in one.samples():
        if row["reward"] is not None:
            assert row["reward"] == row["reward/correct"] - 0.25 * row["reward/ended"]
    for row in one.rows():
        for stream in ("", "val/") if row["step"] in (4, 8) else ("",):
            parts = row[f"{stream}reward/correct"] - 0.25 * row[f"{stream}reward/ended"]
            assert row[f"{stream}reward/mean"] == pytest.approx(parts, abs=1e-12)


@pytest.mark.soak
def test_any_number_of_actor_ranks(straight, new_run, same_run):
    """2 ranks to step 4, whose next checkpoints are damaged or gone, then one rank to a kill -9, then three."""
    run = new_run({})
    shutil.copytree(straight.directory, run.directory)
    for step in (5, 7, 8):
        shutil.rmtree(run.checkpoints / f"global_step_{step}")
    _flip_a_bit(run.checkpoints / "global_step_6" / "actor" / "__1_0.distcp")
    printed = run.kill_when("global_step_6 (", AUTO, *_as_arguments(ONE_ACTOR))
    assert "stepped over a damaged checkpoint" in printed and "__1_0.distcp" in printed
    assert "resumed from global_step_4" in printed
    assert "saved by 2 actor ranks, now 1: the numbers stay bit-equal" in printed
    assert "reproducible: yes; engine and trainer agree: yes (" in printed, "a resume checks itself, too"
    printed = run.finish(AUTO, *_as_arguments(THREE_ACTORS))
    assert "saved by 1 actor ranks, now 3: the numbers stay bit-equal" in printed
    same_run(straight, run, 8, same_ranks=False)


def _as_arguments(overrides: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.soak
def test_a_new_run_from_old_weights(straight, new_run, same_run):
    weights = (f"runner.resume_dir={straight.checkpoints / 'global_step_8'}", "runner.resume_mode=weights")
    whole, killed = new_run(ONE_ACTOR), new_run(ONE_ACTOR)
    printed = whole.finish(*weights)
    assert "a new run, with the model weights of step 8" in printed and "saved by 2 actor ranks" not in printed
    assert whole.digest(8) != straight.digest(8)
    killed.kill_when("global_step_3 (", *weights)
    assert "resumes from the newest one" in killed.finish(*weights, "runner.max_time=00:00:01", expect=75)
    killed.finish(AUTO)
    same_run(whole, killed, 8)


@pytest.mark.soak
@pytest.mark.parametrize("rollouts", [{}, TWO_ROLLOUTS], ids=["1 rollout", "2 rollouts"])
@pytest.mark.parametrize("actors", [ONE_ACTOR, TWO_ACTORS, THREE_ACTORS], ids=["1 rank", "2 ranks", "3 ranks"])
@pytest.mark.parametrize("step", KILLS)
def test_every_topology(step, actors, rollouts, straight, new_run, same_run):
    killed = new_run({**actors, **rollouts})
    killed.kill_when(f"global_step_{step} (")
    killed.finish(AUTO)
    same_run(straight, killed, 8, same_ranks=actors is TWO_ACTORS)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_one_to_four_ranks_and_four_two_three_one(algorithm, new_run, same_run):
    """Each number of ranks straight, and a run whose ranks begin where kill -9 ended those before: after every step."""
    settings = ALGORITHMS[algorithm]
    alone, *others = (new_run({**settings, "cluster.component_placement.actor": f"0-{last}"}) for last in range(4))
    for run in (alone, *others):
        run.finish()
    changing = new_run(settings)
    for slots, text in (("0-3", "global_step_2 ("), ("0-1", "global_step_4 ("), ("0-2", "step    6/8")):
        changing.kill_when(text, AUTO, f"cluster.component_placement.actor={slots}")
    changing.finish(AUTO, *_as_arguments(ONE_ACTOR))
    digests = [alone.digest(step) for step in range(1, 9)]
    assert len(set(digests)) == 8
    for run in (*others, changing):
        same_run(alone, run, 8, same_ranks=False)
        assert [run.digest(step) for step in range(1, 9)] == digests
