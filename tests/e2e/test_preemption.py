"""A stop request: completed steps are saved, the exit code asks for a resume, and the resumed run is bit-equal."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME

pytestmark = pytest.mark.timeout(900)  # several whole runs a test

AUTO = "runner.resume_dir=auto"
NO_SAVES = {"runner.save_interval": "-1"}


def stop(run, process, number: int, expect: int) -> str:
    process.send_signal(number)
    printed, _ = process.communicate(timeout=600)
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


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A signal while the run is in ``phase`` of ``step``, and what it leads to."""

    phase: str
    step: int
    action: str
    number: int
    code: int = EXIT_OUT_OF_TIME
    interrupted: str
    saved: int


IN_ROLLOUT = Stop(
    phase="rollout.train",
    step=2,
    action="hang",
    number=signal.SIGTERM,
    interrupted="SIGTERM: 1 of 8 steps",
    saved=1,
)
IN_UPDATE = Stop(  # which is finished
    phase="actor.update",
    step=3,
    action="wait",
    number=signal.SIGTERM,
    interrupted="SIGTERM: 3 of 8 steps",
    saved=3,
)
IN_VALIDATION = Stop(  # which is still to come, and the row of metrics too
    phase="rollout.val",
    step=4,
    action="hang",
    number=signal.SIGINT,
    code=EXIT_INTERRUPTED,
    interrupted="Ctrl-C: 4 of 8 steps",
    saved=4,
)
IN_SAVE = Stop(
    phase="save.written",
    step=5,
    action="wait",
    number=signal.SIGUSR1,
    interrupted="SIGUSR1: ",
    saved=5,
)


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([IN_UPDATE], id="finished"),
        pytest.param([IN_VALIDATION], id="given up", marks=pytest.mark.soak),
        pytest.param([IN_ROLLOUT, IN_UPDATE, IN_VALIDATION, IN_SAVE], id="every phase", marks=pytest.mark.soak),
    ],
)
def test_stopped_in_a_phase(stops, straight, new_run, same_run, tmp_path):
    """A run that saves nothing by itself, stopped again and again."""
    run, mark = new_run(NO_SAVES), tmp_path / "reached"
    for place, each in enumerate(stops):
        save = [f"runner.save_interval={each.step}"] if each is IN_SAVE else []
        process = start_and_reach(run, mark, each.phase, each.step, each.action, *save)
        printed = stop(run, process, each.number, each.code)
        assert f"interrupted by {each.interrupted}" in printed
        assert f"{each.interrupted.partition(':')[0]}: stopping" in printed
        if each is not IN_SAVE:  # which may be followed by one more
            assert run.steps() == [earlier.saved for earlier in stops[: place + 1]]
        assert each.saved in run.steps()
        if each is IN_VALIDATION:
            assert [row["step"] for row in run.rows()] == [1, 2, 3]
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


def ends_and_leaves_nothing(process, started: set[psutil.Process], expect: int, still_running) -> None:
    """At once, by what it costs here: `ray job stop` kills after 3 s. Of what was started nothing is left then."""
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 30:
        time.sleep(0.01)
    seconds = time.monotonic() - began
    assert process.returncode == expect and seconds < 3 * slowness(), f"{process.returncode} after {seconds:.1f} s"
    left = still_running(started, 3 * slowness())
    assert not left, left


def slowness() -> float:
    """How many ready processes share a core, at least 1: a machine under load is no slower driver."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.soak  # shorter: tests/unit/recovery/test_parent.py
def test_stopped_while_it_starts(new_run, still_running):
    """Before its imports, while Ray starts, when it has started, while workers import and build."""
    for text, later in [
        (None, 0.0),
        ("starting ...", 0.0),
        ("starting ...", 1.0),
        ("starting ...", 2.0),
        ("ray:", 0.5),
    ]:
        run = new_run({}, plain=text is None)
        process = run.start()
        if text is not None:
            run.read_until(process, text)
        while text is None and not catches(process.pid, signal.SIGTERM):
            time.sleep(0.01)  # Python itself is starting
        until = time.monotonic() + later
        started = set(run.below(process))
        while time.monotonic() < until:
            time.sleep(0.05)
            started |= set(run.below(process))
        process.send_signal(signal.SIGTERM)
        ends_and_leaves_nothing(process, started, EXIT_OUT_OF_TIME, still_running)
        assert run.steps() == []


@pytest.mark.soak
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_OUT_OF_TIME), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_stopped_twice(number, code, new_run, still_running, tmp_path):
    run = new_run({})
    process = start_and_reach(run, tmp_path / "reached", "actor.update", 2, "hang")
    started = set(run.below(process))
    assert "raylet" in {child.name() for child in started}
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    ends_and_leaves_nothing(process, started, code, still_running)


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
            printed, _ = process.communicate(timeout=600)
            longest = max(longest, time.monotonic() - asked)
            stops += 1
            ended = process.returncode == 0
            assert process.returncode in (0, EXIT_OUT_OF_TIME) and "Traceback" not in printed, printed
            rows = run.rows() if (run.directory / "metrics.jsonl").exists() else []
            completed = max((row["step"] for row in rows), default=0)
            newest = max(run.steps(), default=0)
            assert newest >= completed, f"{completed} steps were completed, {newest} is saved\n{printed}"
        same_run(straight, run, 8)
    print(f"{stops} stops, the longest took {longest:.1f} s")
    assert longest < 30
