"""The parent process: a killed driver is started again bit-equal, and a killed parent leaves nothing running."""

from __future__ import annotations

import re
import signal
import time

import pytest

pytestmark = pytest.mark.timeout(900)  # several whole runs a test


def test_a_driver_that_is_killed_is_started_again(straight, new_run, same_run, still_running):
    """While it starts, and in the middle of a run; nothing of its Ray is left behind."""
    run = new_run({})
    process = run.start(faults=[run.hold(6)])
    printed = run.read_until(process, "starting ...")
    run.driver(process).kill()
    printed += run.read_until(process, "step    3/8")
    driver = run.driver(process)
    started = run.below(process)
    driver.send_signal(signal.SIGSEGV)
    run.let_go()
    rest, _ = process.communicate(timeout=600)
    printed += rest
    assert process.returncode == 0, printed
    assert "!! the driver was killed by SIGKILL\n" in printed and "!! the driver was killed by SIGSEGV\n" in printed
    assert "starting the driver again, with 0 steps completed (restart 1 of 10)" in printed
    assert re.search(r"with [2-5] steps completed \(restart 2 of 10\)", printed) and "resumed from global_" in printed
    assert not still_running(started, 1.0)
    same_run(straight, run, 8)


def test_a_parent_that_is_killed_leaves_nothing(new_run, still_running):
    for text, plain in (("starting ...", True), ("step    2/8", False)):
        run = new_run({}, plain=plain)
        process = run.start(faults=[run.hold(5)])
        run.read_until(process, text)
        time.sleep(1.0 if "starting" in text else 0.0)
        started = run.below(process)
        assert any(child.name() == "raylet" for child in started) or "starting" in text
        process.kill()
        process.wait(timeout=60)
        left = still_running(started, 10.0)
        assert not left, left
