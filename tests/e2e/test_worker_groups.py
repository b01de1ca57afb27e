"""Worker groups of a Ray of the driver's own: fixed kernels in their processes, refused operations, and two queues."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlinf_lite import numerics
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE, ForkServer

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


@pytest.fixture
def seen(tmp_path: Path, run_forked: Callable[..., subprocess.CompletedProcess[str]], forks: ForkServer):
    """What a driver with two groups of workers has seen."""
    (tmp_path / "computer.py").write_text(_WORKERS)
    (tmp_path / "grader.py").write_text(_GRADERS)
    environment = {"RAY_ADDRESS": "local", "GRADED": str(tmp_path / "graded"), TEMPLATE_VARIABLE: forks.name}
    environment = {**os.environ, **environment, numerics.WORKSPACE: ":0:0"}
    driver = run_forked("-c", _DRIVER, cwd=tmp_path, env=environment, timeout=550)
    assert driver.returncode == 0, driver.stderr[-3000:]
    return json.loads(driver.stdout.splitlines()[-1])


def test_two_groups_of_workers(seen):
    """Kernels are fixed in their processes, and a refused operation crosses Ray with its name. Graders continue while
    the last response is made: the second item is made only when the third is graded, and there is one grader."""
    assert seen["state"] == [numerics.environment(), 1, True, False]
    name, message, code = seen["refused"]
    assert (name, code) == ("NotDeterministic", 2)
    assert message.startswith("error: put_: this operation has no deterministic form")
    assert seen["made"] == [[0, 0], [1, 1]]
    assert seen["graded"] == [[0, 0], [1, -1], [2, -2]]
