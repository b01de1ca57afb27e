"""Recovery within one start: whatever process is killed, the run ends as bit-equal to one that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rlinf_lite.checkpoint import layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.errors import EXIT_WORKER_LOST

pytestmark = pytest.mark.timeout(900)  # several whole runs a test

AUTO = "runner.resume_dir=auto"
REPLICAS = "runner.checkpoint.memory_replicas=1"
SPARES = "cluster.warm_spares=1"
TWO_ROLLOUTS = {"cluster.component_placement.rollout": "0-1"}


def kill(run, group: str, rank: int = 0, number: int = signal.SIGKILL) -> None:
    workers = json.loads((run.directory / "workers.json").read_text())["workers"]
    (pid,) = [worker["pid"] for worker in workers if (worker["group"], worker["rank"]) == (group, rank)]
    os.kill(pid, number)


def finish(run, process, expect: int = 0) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit code {process.returncode}\n{printed}"
    return printed


def test_every_kind_of_worker_dies(straight, new_run, same_run, tmp_path):
    """Alone or two at once: no completed step is made twice, and a save that was cut off is made up for."""
    run = new_run({**TWO_ROLLOUTS, "runner.save_interval": "3"})
    mark, armed = tmp_path / "saving", tmp_path / "armed"
    armed.touch()
    hangs = {"phase": "save.halfway", "step": 3, "rank": 0, "action": "hang", "mark": str(mark), "armed": str(armed)}
    process = run.start(REPLICAS, SPARES, faults=[hangs, run.hold(7)])
    printed = run.read_until(process, "step    2/8")
    kill(run, "actor", 1)
    second = run.finish(AUTO, expect=2)
    assert f"in use by process {run.driver(process).pid} on " in second and "since" in second
    printed += run.read_until(process, "step    3/8")
    while not mark.exists():
        time.sleep(0.01)
    kill(run, "actor", 0)
    printed += run.read_until(process, "step    4/8")
    kill(run, "rollout", 1)
    printed += run.read_until(process, "step    5/8")
    kill(run, "reward")
    printed += run.read_until(process, "step    6/8")
    kill(run, "actor", 0)  # the save of step 6 is in flight, or over
    kill(run, "rollout", 0)
    run.let_go()
    printed += finish(run, process)
    assert "Traceback" not in printed
    assert printed.count("reproducible: yes") == printed.count("reproducible: ") == 1, "once, not for replaced workers"
    assert printed.count("ActorGroup rank 1 was lost") == printed.count("RewardGroup rank 0 was lost") == 1
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("step ")] == [
        f"{step}/8" for step in range(1, 9)
    ]
    assert run.steps() == [3, 6, 8]
    assert printed.count("removed 1 unfinished save(s)") in (1, 2) and "global_step_3.tmp-" in printed
    assert not list((run.directory / "checkpoints").glob("*.tmp-*"))
    same_run(straight, run, 8)


@pytest.mark.soak
def test_an_engine_dies_in_the_broadcast_of_the_weights(straight, new_run, same_run, tmp_path):
    """The other engine, and the ranks that gather weights with the one that sends them, wait for it in a collective."""
    run, mark = new_run({**TWO_ROLLOUTS, "cluster.weight_sync": "collective"}), tmp_path / "sending"
    slow = {"phase": "actor.rows", "step": 4, "rank": 0, "action": "wait", "mark": str(mark)}
    process = run.start(REPLICAS, SPARES, faults=[slow])
    run.read_until(process, "step    3/8")
    while not mark.exists():
        time.sleep(0.01)
    kill(run, "rollout", 1)
    printed = finish(run, process)
    assert printed.count("RolloutGroup rank 1 was lost") == 1
    assert "ActorGroup rank" not in printed, "it gathers all weights, and keeps its process"
    same_run(straight, run, 8)


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_and_an_engine_are_lost_in_one_rollout(new_run, same_run, tmp_path, strategy, number):
    """The new engine is set up while the rank of which it needs weights is gone, or stopped."""
    given = {**TWO_ROLLOUTS, "runner.max_steps": "4", "actor.fsdp_config.strategy": strategy}
    straight, run = new_run(given), new_run(given)
    straight.finish()
    marks = [tmp_path / f"generating{rank}" for rank in range(2)]
    slow = {"phase": "rollout.train", "step": 3, "action": "wait"}
    faults = [{**slow, "rank": rank, "mark": str(mark)} for rank, mark in enumerate(marks)]
    process = run.start(REPLICAS, SPARES, "runner.hang_timeout=8", faults=faults)
    printed = run.read_until(process, "step    2/4")
    while not all(mark.exists() for mark in marks):
        time.sleep(0.01)
    kill(run, "actor", 1, number), kill(run, "rollout", 1)
    printed += finish(run, process)
    assert "the state of step 2 was in memory" in printed and "Traceback" not in printed
    same_run(straight, run, 4)


@pytest.mark.soak
def test_without_replicas_the_newest_checkpoint_is_the_second_line(straight, new_run, same_run):
    run = new_run({"runner.save_interval": "3", "runner.checkpoint.memory_replicas": "0"})
    process = run.start()
    printed = run.read_until(process, "step    2/8")
    kill(run, "actor", 0)
    printed += run.read_until(process, "!! no checkpoint to resume from: the run begins again")
    printed += run.read_until(process, "global_step_3 (")
    printed += run.read_until(process, "step    5/8")
    kill(run, "actor", 1)
    printed += finish(run, process)
    assert "resumed from global_step_3" in printed and "completed step(s) are done again" in printed
    assert run.steps() == [3, 6, 8]
    same_run(straight, run, 8)


@pytest.mark.soak
def test_what_kills_a_rank_at_the_same_place_again_is_given_up(new_run):
    run = new_run({})
    printed = run.finish(
        REPLICAS, faults=[{"phase": "save.write", "step": 2, "rank": 1, "action": "kill"}], expect=EXIT_WORKER_LOST
    )
    assert printed.count("!! ActorGroup rank 1 was lost") == 3 and "restart 2 of 10" in printed
    assert "3 times in a row with 2 steps completed" in printed and "Traceback" not in printed
    assert run.steps() == [1]


@pytest.mark.soak
def test_what_is_stopped_is_noticed_shown_and_replaced(straight, new_run, same_run):
    run = new_run({})
    process = run.start(REPLICAS, SPARES, "runner.hang_timeout=8")
    run.read_until(process, "step    3/8")
    kill(run, "actor", 1, signal.SIGSTOP)
    printed = run.read_until(process, "step    6/8")
    kill(run, "rollout", 0, signal.SIGSTOP)
    printed += finish(run, process)
    assert "no progress for" in printed and "actor rank 1, process" in printed and ", stopped:" in printed
    assert "rollout rank 0, process" in printed and "most recent call first" in printed
    assert printed.count("was in memory") == 1 and printed.count("step    7/8") == 1
    same_run(straight, run, 8)


@pytest.mark.soak
def test_ray_itself_is_killed(straight, new_run, same_run, tmp_path: Path):

    run = new_run({})
    process = run.start(REPLICAS)
    run.read_until(process, "step    3/8")
    for child in run.below(process):
        with suppress(psutil.NoSuchProcess):  # an agent ends with its raylet
            if child.name() in ("raylet", "gcs_server"):
                child.kill()
    printed = finish(run, process)
    assert "Ray was lost" in printed and "starting the driver again" in printed
    same_run(straight, run, 8)


@pytest.mark.soak
def test_a_damaged_checkpoint_does_not_pass_for_the_save_that_was_cut_off(straight, new_run, same_run, tmp_path):
    """Steps 4 and 8 are saved, 8 is damaged: the run resumes from 4, and loses a rank while it saves step 8 again."""
    run = new_run({"runner.save_interval": "4"})
    shutil.copytree(straight.directory, run.directory)
    for path in layout.committed(run.checkpoints):
        if layout.step_of(path) not in (4, 8):
            shutil.rmtree(path)
    shard = run.checkpoints / "global_step_8" / "actor" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    mark = tmp_path / "saving"
    slow = {"phase": "save.halfway", "step": 8, "rank": 0, "action": "wait", "mark": str(mark)}
    process = run.start(AUTO, REPLICAS, faults=[slow])
    printed = run.read_until(process, "step    8/8")
    while not mark.exists():
        time.sleep(0.01)
    kill(run, "actor", 1)
    printed += finish(run, process)
    assert printed.count("stepped over a damaged checkpoint") == 1 and "that of step 8 was interrupted" in printed
    assert "was committed before its workers were lost" not in printed
    manifests.read_verified(run.checkpoints / "global_step_8", "full")
    assert len(list(run.checkpoints.glob("global_step_8.damaged-*"))) == 1
    same_run(straight, run, 8)
