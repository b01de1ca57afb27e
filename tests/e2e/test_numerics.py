"""Fixed kernels in worker processes: what they have in their environment, and how a refused operation ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlinf_lite import numerics

pytestmark = pytest.mark.timeout(300)

_WORKER = """
import os
import torch
from rlinf_lite.cluster.workers.device import fix_device

class Computer:
    def __init__(self, rank, size, config, names):
        self.before = {name: os.environ.get(name) for name in names}
        fix_device(config.cluster, "cpu")

    def state(self):
        strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return self.before, torch.get_num_threads(), *strict

    def refused(self):
        return torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
"""

_DRIVER = """
import json
from rlinf_lite import numerics
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import open_session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.driver import load
from rlinf_lite.runner.failures import explain

config = load(["cluster.component_placement={actor: 0, rollout: 0, reward: 0}", "cluster.warm_spares=0"])
names = [*numerics.environment()]
with open_session(config.cluster, Watch(hang_timeout=120)) as session:
    group = WorkerGroup("Computers", "actor", "computer:Computer", session, Spares(session), config, names)
    state = group.call("state")[0]
    try:
        group.call("refused")
    except Exception as error:
        print(json.dumps([state, type(error).__name__, *explain(error)]))
"""


def test_a_refused_operation_crosses_ray_with_its_name(tmp_path):
    (tmp_path / "computer.py").write_text(_WORKER)
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(tmp_path), numerics.WORKSPACE: ":0:0"},
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr[-3000:]
    state, name, message, code = json.loads(driver.stdout.splitlines()[-1])
    assert state == [numerics.environment(), 1, True, False]
    assert (name, code) == ("NotDeterministic", 2)
    assert message.startswith("error: put_: this operation has no deterministic form")
