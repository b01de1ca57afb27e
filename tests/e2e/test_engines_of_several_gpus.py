"""A rollout engine that spreads its layers over GPUs: its slots and GPUs. Ray is told of GPUs; there are none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

_WORKER = """
import os

class Engine:
    def __init__(self, rank, size): pass

    def gpus(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]
"""

_DRIVER = """
import json, sys
from rlinf_lite.cluster.group import WorkerGroup
from rlinf_lite.cluster.session import open_session
from rlinf_lite.cluster.spares import Spares
from rlinf_lite.cluster.watch import Watch
from rlinf_lite.config.compose import load
from rlinf_lite.errors import ConfigError

def see(size, *settings):
    config = load([*settings, "cluster.device=cuda", "cluster.warm_spares=0"]).cluster
    try:
        with open_session(config, Watch(hang_timeout=120), tensor_parallel_size=size) as session:
            engines = WorkerGroup("Engines", "rollout", "engine:Engine", session, Spares(session))
            actors = WorkerGroup("Actors", "actor", "engine:Engine", session, Spares(session))
            before = engines.call("gpus")
            engines.replace(0)
            nodes = [location.node_id for location in engines.locations()]
            return before, engines.call("gpus"), actors.call("gpus"), len(set(nodes))
    except ConfigError as error:
        return str(error)

place = "cluster.component_placement={actor: %s, rollout: %s, reward: 0}"
print(json.dumps([
    see(2, place % ("0-3", "0-3")),
    see(2, place % ("0-2", "0-2")),
    see(4, place % ("0", "0-3")),
    see(2, place % ("0", "0-3"), "cluster.elastic=true"),
]))
"""


def test_engines_get_the_gpus_of_their_slots(tmp_path, ray_nodes):
    (tmp_path / "engine.py").write_text(_WORKER)
    path = {"PYTHONPATH": str(tmp_path)}
    with ray_nodes(2, num_cpus_each=4, extra_env=path, num_gpus_each=2) as cluster:
        driver = subprocess.run(
            [sys.executable, "-c", _DRIVER],
            env={**os.environ, **cluster.env},
            capture_output=True,
            text=True,
        )
    assert driver.returncode == 0, driver.stderr[-3000:]
    fits, odd, spread, elastic = json.loads(driver.stdout.splitlines()[-1])
    engines, replaced, actors, num_nodes = fits
    assert engines == replaced and num_nodes == 2
    assert engines == [f"{actors[0]},{actors[1]}", f"{actors[2]},{actors[3]}"]
    assert sorted(actors[:2]) == sorted(actors[2:]) == ["0", "1"]
    assert "rollout has 3 slots, and rollout.tensor_parallel_size=2 makes one engine of as many GPUs" in odd
    assert "the rollout engine in slots 0, 1, 2, 3 would be spread over the nodes" in spread
    assert elastic.startswith("cluster.elastic=true: engines of rollout.tensor_parallel_size=2 GPUs cannot be moved")
