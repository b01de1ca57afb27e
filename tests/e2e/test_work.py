"""Two groups with a queue each: a free worker gets its next item, also while the driver waits for the other group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(600)

_WORKERS = """
import os, time

class Maker:
    def __init__(self, *_): pass

    def make(self, number):
        while number == 1 and not os.path.exists(os.environ["GRADED"]):
            time.sleep(0.02)
        return number

class Grader:
    def __init__(self, *_): pass

    def grade(self, number):
        if number == 2:
            open(os.environ["GRADED"], "w").close()
        return -number
"""

_DRIVER = """
import json
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import open_session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.driver import load

config = load(["cluster.component_placement={actor: 0, rollout: 0, reward: 0}", "cluster.warm_spares=0"]).cluster
with open_session(config, Watch(hang_timeout=20)) as session:
    spares = Spares(session)
    makers = WorkerGroup("Makers", "rollout", "two_kinds:Maker", session, spares)
    graders = WorkerGroup("Graders", "reward", "two_kinds:Grader", session, spares)
    making = WorkQueue(makers, lambda rank, number: makers.start_one(rank, "make", number))
    grading = WorkQueue(graders, lambda rank, number: graders.start_one(rank, "grade", number))
    for number in (0, 1):
        making.add(number, number)
    made = []
    for key, value in making.results(beside=[grading]):
        made.append((key, value))
        for number in range(3) if key == 0 else ():
            grading.add(number, number)
    print(json.dumps([made, sorted(grading.results())]))
"""


def test_graders_continue_while_the_last_response_is_made(tmp_path):
    """The second item is made only when the third is graded, and there is one grader: it must get it meanwhile."""
    (tmp_path / "two_kinds.py").write_text(_WORKERS)
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(tmp_path), "GRADED": str(tmp_path / "graded")},
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    made, graded = json.loads(driver.stdout.splitlines()[-1])
    assert made == [[0, 0], [1, 1]]
    assert graded == [[0, 0], [1, -1], [2, -2]]
