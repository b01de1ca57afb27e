"""Asked to stop: what is completed is saved, the exit code says go on, and the run that goes on is the same run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from rlinf_lite.runner.failures import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("e2e")]  # several whole runs a test

AUTO = "runner.resume_dir=auto"
NO_SAVES = {"runner.save_interval": "-1"}


def stop(run, process, number: int, expect: int) -> str:
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == expect and "Traceback" not in printed, f"exit code {process.returncode}\n{printed}"
    return printed


def start_and_reach(run, mark: Path, phase: str, step: int, action: str, *extra: str):
    """A run that is in ``phase`` of ``step`` when this returns, and stays there for a while."""
    mark.unlink(missing_ok=True)
    process = run.start(AUTO, *extra, faults=[{"phase": phase, "step": step, "action": action, "mark": str(mark)}])
    while not mark.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


def test_stopped_in_every_phase(straight, new_run, same_run, tmp_path):
    """A run that saves nothing by itself, stopped in the middle of a rollout, an update, a validation and a save."""
    run, mark = new_run(NO_SAVES), tmp_path / "reached"
    process = start_and_reach(run, mark, "rollout.train", 2, "hang")
    printed = stop(run, process, signal.SIGTERM, EXIT_OUT_OF_TIME)
    assert "SIGTERM: stopping" in printed and "interrupted by SIGTERM: 1 of 8 steps" in printed
    assert run.steps() == [1]

    process = start_and_reach(run, mark, "actor.update", 3, "wait")
    printed = stop(run, process, signal.SIGUSR1, EXIT_OUT_OF_TIME)
    assert "interrupted by SIGUSR1: 3 of 8 steps" in printed  # an update is finished
    assert run.steps() == [1, 3]

    process = start_and_reach(run, mark, "rollout.val", 4, "hang")
    printed = stop(run, process, signal.SIGINT, EXIT_INTERRUPTED)
    assert "interrupted by Ctrl-C: 4 of 8 steps" in printed  # its validation and its row are still to come
    assert run.steps() == [1, 3, 4] and [row["step"] for row in run.rows()] == [1, 2, 3]

    process = start_and_reach(run, mark, "save.written", 5, "wait", "runner.save_interval=5")
    stop(run, process, signal.SIGTERM, EXIT_OUT_OF_TIME)
    assert 5 in run.steps()
    run.finish(AUTO)
    same_run(straight, run, 8)


@pytest.mark.soak
def test_an_update_that_takes_longer_than_the_grace_is_given_up(new_run, tmp_path):
    run = new_run({"runner.save_interval": "1"})
    process = start_and_reach(run, tmp_path / "reached", "actor.update", 3, "hang", "runner.preemption_grace=1")
    began = time.monotonic()
    printed = stop(run, process, signal.SIGTERM, EXIT_OUT_OF_TIME)
    assert time.monotonic() - began < 20
    assert "in the middle of an update or a recovery" in printed and run.steps() == [1, 2]


@pytest.mark.soak
def test_stopped_while_starting_and_stopped_twice(new_run, tmp_path):
    run = new_run({})
    process = run.start()
    run.read_until(process, "starting ...")
    time.sleep(1)
    printed = stop(run, process, signal.SIGTERM, EXIT_OUT_OF_TIME)
    assert "interrupted by SIGTERM" in printed and "before the first step" in printed
    process = start_and_reach(run, tmp_path / "reached", "actor.update", 2, "hang")
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == EXIT_OUT_OF_TIME and time.monotonic() - began < 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_random_instants(straight, new_run, same_run):
    """SIGTERM at any instant of a run, again and again: each time the newest completed step is saved."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    instants, stops, longest = random.Random(seed), 0, 0.0
    while stops < 50:
        run = new_run({**NO_SAVES, "runner.checkpoint.memory_replicas": str(instants.randrange(2))})
        ended = False
        while not ended:
            process = run.start(AUTO)
            if instants.random() < 0.2:
                time.sleep(instants.uniform(1.5, 12))  # while it starts
            else:
                run.read_until(process, "model:")
                time.sleep(instants.uniform(0, 4))
            process.send_signal(instants.choice([signal.SIGTERM, signal.SIGUSR1]))
            asked = time.monotonic()
            printed, _ = process.communicate(timeout=120)
            longest = max(longest, time.monotonic() - asked)
            stops += 1
            ended = process.returncode == 0
            assert process.returncode in (0, EXIT_OUT_OF_TIME) and "Traceback" not in printed, printed
            rows = run.rows() if (run.folder / "metrics.jsonl").exists() else []
            completed = max((row["step"] for row in rows), default=0)
            newest = max(run.steps(), default=0)
            assert newest >= completed, f"{completed} steps were completed, {newest} is saved\n{printed}"
        same_run(straight, run, 8)
    print(f"{stops} stops, the longest took {longest:.1f} s")
    assert longest < 30
