"""Worker groups of a Ray of the driver's own: fixed kernels in their processes, refused operations, and two queues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from rlinf_lite import numerics

pytestmark = pytest.mark.timeout(600)

_WORKERS = """
import os, time
import torch
from rlinf_lite.cluster.workers.device import fix_device

class Computer:
    def __init__(self, rank, size, config, names):
        self.before = {name: os.environ.get(name) for name in names}
        fix_device(config, "cpu")

    def state(self):
        strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return self.before, torch.get_num_threads(), *strict

    def refused(self):
        return torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))

    def make(self, number):
        while number == 1 and not os.path.exists(os.environ["GRADED"]):
            time.sleep(0.02)
        return number
"""

_GRADERS = """
import os

class Grader:
    def __init__(self, *_): pass

    def grade(self, number):
        if number == 2:
            open(os.environ["GRADED"], "w").close()
        return -number
"""

_DRIVER = """
import json
from rlinf_lite import numerics
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import open_session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.cluster.work_queue import WorkQueue
from rlinf_lite.config.compose import load
from rlinf_lite.runner.failures import explain

config = load(["cluster.component_placement={actor: 0, rollout: 0, reward: 0}", "cluster.warm_spares=0"]).cluster
with open_session(config, Watch(hang_timeout=120)) as session:
    spares, names = Spares(session), [*numerics.environment()]
    computers = WorkerGroup("Computers", "actor", "computer:Computer", session, spares, config, names)
    graders = WorkerGroup("Graders", "reward", "grader:Grader", session, spares)
    state, refused = computers.call("state")[0], None
    try:
        computers.call("refused")
    except Exception as error:
        refused = [type(error).__name__, *explain(error)]
    making = WorkQueue(computers, lambda rank, number: computers.start_one(rank, "make", number))
    grading = WorkQueue(graders, lambda rank, number: graders.start_one(rank, "grade", number))
    for number in (0, 1):
        making.add(number, number)
    made = []
    for key, value in making.results(beside=[grading]):
        made.append((key, value))
        for number in range(3) if key == 0 else ():
            grading.add(number, number)
    print(json.dumps({"state": state, "refused": refused, "made": made, "graded": sorted(grading.results())}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one driver with two groups of workers has seen."""
    directory = tmp_path_factory.mktemp("groups")
    (directory / "computer.py").write_text(_WORKERS)
    (directory / "grader.py").write_text(_GRADERS)
    environment = {"RAY_ADDRESS": "local", "PYTHONPATH": str(directory), "GRADED": str(directory / "graded")}
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        env={**os.environ, **environment, numerics.WORKSPACE: ":0:0"},
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    return json.loads(driver.stdout.splitlines()[-1])


@pytest.mark.xdist_group("worker groups")
def test_fixed_kernels_and_a_refused_operation_that_crosses_ray_with_its_name(seen):
    assert seen["state"] == [numerics.environment(), 1, True, False]
    name, message, code = seen["refused"]
    assert (name, code) == ("NotDeterministic", 2)
    assert message.startswith("error: put_: this operation has no deterministic form")


@pytest.mark.xdist_group("worker groups")
def test_graders_continue_while_the_last_response_is_made(seen):
    """The second item is made only when the third is graded, and there is one grader: it must get it meanwhile."""
    assert seen["made"] == [[0, 0], [1, 1]]
    assert seen["graded"] == [[0, 0], [1, -1], [2, -2]]
