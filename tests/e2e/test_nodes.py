"""Nodes and Ray itself die: what `RayPulse` and `cluster.nodes` tell the driver, and a whole run on three nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

_JOINED = """
import json, os, sys, time, ray
from ray._raylet import GcsClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
from rlinf_lite.cluster.nodes import dead, draining
from rlinf_lite.cluster.pulse import RayPulse

ray.init(address=os.environ["RAY_ADDRESS"], logging_level="CRITICAL", log_to_driver=False)
pulse = RayPulse(patience=1.0)

@ray.remote(num_cpus=0)
class Busy:
    def node(self):
        return ray.get_runtime_context().get_node_id()

def drain(node, seconds):
    deadline = int((time.time() + seconds) * 1000) if seconds else 0
    # 2: DRAIN_NODE_REASON_PREEMPTION
    return GcsClient(address=os.environ["RAY_ADDRESS"]).drain_node(node, 2, "test", deadline)[0]

for line in sys.stdin:
    print("answer", json.dumps(eval(line)), flush=True)  # Ray prints too
"""

_PRIVATE = """
import os, sys, time, psutil
me = psutil.Process()
if len(sys.argv) > 2:
    assert not me.children(), me.children()
import ray
from rlinf_lite.cluster import own_ray
own_ray.note_start()
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000, logging_level="CRITICAL")
if len(sys.argv) > 2:
    print("again", os.getpid(), flush=True)
    ray.shutdown()
    sys.exit(0)

from rlinf_lite.cluster.pulse import RayPulse

@ray.remote(num_cpus=0)
class Busy:
    def where(self):
        return os.getpid()
    def spin(self):
        while True: pass

busy = Busy.remote()
print("worker", ray.get(busy.where.remote()), flush=True)
pulse = RayPulse()
assert pulse.private and pulse.lost() is None
ref = busy.spin.remote()
next(child for child in me.children() if child.name() == sys.argv[1]).kill()
killed = time.monotonic()
while (what := pulse.lost()) is None:
    assert time.monotonic() < killed + 5
    ray.wait([ref], timeout=0.25)
print("lost", what, flush=True)
pulse.end()
print("ended", time.monotonic() - killed, flush=True)
os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[-2], sys.argv[1], "again"])
"""


class _Driver:
    def __init__(self, cluster) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _JOINED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **cluster.env},
        )

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)

    def ask(self, expression: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        answers = (line for line in self.process.stdout if line.startswith("answer "))
        return json.loads(next(answers).removeprefix("answer "))

    def seconds_until(self, expression: str, value: Any, limit: float) -> float:
        started = time.monotonic()
        while (found := self.ask(expression)) != value:
            assert time.monotonic() < started + limit, f"{expression} is {found!r}, not {value!r}, after {limit} s"
            time.sleep(0.05)
        return time.monotonic() - started


@pytest.fixture
def joined(ray_nodes):
    """Makes a cluster of so many nodes and a driver that has joined it."""
    with ExitStack() as stack:

        def make(num_nodes: int):
            cluster = stack.enter_context(ray_nodes(num_nodes))
            driver = _Driver(cluster)
            stack.callback(driver.end)
            return cluster, driver

        yield make


@pytest.mark.soak
def test_nodes_that_drain_die_and_join(joined):
    cluster, driver = joined(3)
    ids = [cluster.nodes[number]["id"] for number in range(3)]
    assert driver.ask(f"sorted(dead({ids})) + sorted(draining({ids}))") == []
    driver.ask(
        f"globals().update(kept=[Busy.options(scheduling_strategy=On(id, soft=False)).remote() for id in {ids}])"
    )
    assert driver.ask("sorted(set(ray.get([busy.node.remote() for busy in kept])))") == sorted(ids)

    assert driver.ask(f"drain({ids[1]!r}, 100)")
    driver.seconds_until(f"list(draining({ids}))", [ids[1]], limit=10)
    assert 50 < driver.ask(f"draining({ids})")[ids[1]] - time.time() <= 100
    assert driver.ask(f"sorted(dead({ids}))") == []

    assert cluster.kill_node(2) < 10
    driver.seconds_until(f"sorted(dead({ids}))", [ids[2]], limit=15)
    number = cluster.add_node()
    assert driver.ask(f"sorted(dead({[*ids, cluster.nodes[number]['id']]}))") == [ids[2]]
    assert driver.ask("pulse.lost()") is None
    assert not driver.ask("pulse.private")


@pytest.mark.soak
def test_raylet_of_the_drivers_node_dies(joined):
    cluster, driver = joined(2)
    assert driver.ask("pulse.lost()") is None
    cluster.kill_node(1)
    assert driver.ask("pulse.lost()") is None
    raylet = cluster.nodes[0]["raylet"]
    cluster.kill_node(0)
    assert driver.ask("pulse.lost()") == f"the raylet of this node (process {raylet}) is gone"


@pytest.mark.soak
def test_gcs_of_a_joined_cluster_dies(joined):
    cluster, driver = joined(1)
    assert driver.ask("pulse.lost()") is None
    psutil.Process(cluster.gcs).kill()
    said = f"Ray's GCS at {cluster.env['RAY_ADDRESS']} has not answered for 1 s"
    assert driver.ask("pulse.lost()") is None
    assert 0.5 < driver.seconds_until("pulse.lost()", said, limit=10) < 3


@pytest.mark.soak
@pytest.mark.parametrize(("part", "said"), [("raylet", "the raylet of this node"), ("gcs_server", "Ray's GCS")])
def test_a_ray_of_our_own_dies_and_the_driver_starts_again(part, said):
    process = subprocess.Popen([sys.executable, "-c", _PRIVATE, part], stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=600)
    lines = dict(line.partition(" ")[::2] for line in printed.splitlines() if line)
    assert process.returncode == 0, printed
    assert lines["lost"].startswith(said)
    assert float(lines["ended"]) < 5
    assert lines["again"] == str(process.pid)
    assert not psutil.pid_exists(int(lines["worker"])) or psutil.Process(int(lines["worker"])).status() == "zombie"


@pytest.mark.soak
def test_a_run_on_three_nodes(straight, new_run, ray_nodes, monkeypatch, same_run):
    """3 ranks, each on a node of its own, against 2 on one node."""
    with ray_nodes(3) as cluster:
        for name, value in cluster.env.items():
            monkeypatch.setenv({"RAY_ADDRESS": "RLINF_LITE_TEST_RAY"}.get(name, name), value)
        run = new_run(
            {
                "cluster.num_nodes": "3",
                "cluster.component_placement": "{actor:0-2,rollout:0,reward:0}",
            }
        )
        process = run.start()
        run.read_until(process, " 1/8 ")
        hosts = [sum(_is_actor(found) for found in cluster.processes(number)) for number in range(3)]
        printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert hosts == [1, 1, 1]
    same_run(straight, run, 8, same_ranks=False)


def _is_actor(process: psutil.Process) -> bool:
    return "ActorGroup" in " ".join(process.cmdline())
