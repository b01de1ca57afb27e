"""Ray is lost in each phase of a step: the parent starts a new driver, and the run ends as if nothing had happened."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(3600)  # a driver that starts up to ten times

AUTO = "runner.resume_dir=auto"
REPLICAS = "runner.checkpoint.memory_replicas=1"
LOGPROBS = {"algorithm.n_minibatches": "2"}
"""So that log-probs are recomputed before the update."""
PHASES = {
    "reward.score": None,
    "actor.rows": 3,
    "load.read": None,
    "rollout.train": 4,
    "rollout.val": 4,
    "actor.logprobs": 5,
    "actor.update": 6,
    "replica.write": 7,
    "save.halfway": 8,
}
"""Phase and step; None: the first time. A restore is a phase, too: of the start after a loss, from step 3 on,
where a checkpoint is sure to be there."""


def lose_ray(run, marks: Path, phases: Mapping[str, int | None], part: str, still_running) -> None:
    """Run to the end; ``part`` of Ray is killed when a worker is in one of the phases."""
    marks.mkdir()
    faults = []
    for phase, step in phases.items():
        armed = marks / f"{phase}.armed"
        armed.touch()
        fault = {"phase": phase, "action": "wait", "armed": str(armed), "mark": str(marks / phase)}
        faults.append(fault if step is None else {**fault, "step": step})
    process, coming = run.start(AUTO, REPLICAS, faults=faults), set(phases)
    started: set[psutil.Process] = set()
    with ThreadPoolExecutor(1) as reader:
        printed = reader.submit(process.communicate, timeout=3600)  # or the pipe would be full at some time
        while process.poll() is None:
            for phase in [phase for phase in coming if (marks / phase).exists()]:
                coming.remove(phase)
                below = run.below(process)
                started.update(below)
                for child in below:
                    with suppress(psutil.NoSuchProcess):  # what ends with a part that was killed before
                        if child.name() == part:
                            child.kill()
            time.sleep(0.01)
        text = printed.result()[0]
    assert process.returncode == 0, text
    assert not coming, f"never came to {coming}\n{text}"
    left = still_running(started, 5.0)
    assert not left, left
    assert text.count("starting the driver again") == len(phases) and "Traceback" not in text, text


@pytest.mark.parametrize("names", [["actor.rows"], pytest.param(["actor.rows", "load.read"], marks=pytest.mark.soak)])
def test_ray_is_lost_while_the_driver_waits(names, straight, new_run, same_run, still_running, tmp_path):
    """In the weight sync, where handlers ask the group again; and in the restore, where the run is not built yet."""
    run = new_run({})
    phases = {phase: PHASES[phase] for phase in names}
    lose_ray(run, tmp_path / "marks", phases, "raylet", still_running)
    same_run(straight, run, 8)


@pytest.fixture(scope="module")
def with_logprobs(undisturbed):
    return undisturbed("with_logprobs", LOGPROBS)


@pytest.mark.soak
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_ray_is_lost_in_every_phase(part, with_logprobs, new_run, same_run, still_running, tmp_path):
    run = new_run(LOGPROBS)
    lose_ray(run, tmp_path / "marks", PHASES, part, still_running)
    same_run(with_logprobs, run, 8)
