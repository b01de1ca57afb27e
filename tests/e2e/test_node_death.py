"""Whole nodes die during a run: it continues with what the cluster has, and uses nodes that come back."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf_lite import faults
from rlinf_lite.errors import EXIT_OUT_OF_TIME

pytestmark = pytest.mark.timeout(900)  # several whole runs a test

ALGORITHMS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "algorithms.py"))["ALGORITHMS"]
REPLICAS = "runner.checkpoint.memory_replicas=1"
SPREAD = {
    "cluster.num_nodes": "3",
    "cluster.component_placement.actor": "0-2",
    "cluster.component_placement.rollout": "0",
    "cluster.component_placement.reward": "0",
}


@pytest.fixture
def joined(ray_nodes, monkeypatch):
    """Makes a cluster of nodes with a location each, which runs join."""

    def join(cluster) -> None:
        for name, value in cluster.env.items():
            monkeypatch.setenv("RLINF_LITE_TEST_RAY" if name == "RAY_ADDRESS" else name, value)

    return join


def kill_node_of(cluster, run, group: str, head: str) -> int:
    """Kill a node, not the driver's, on which a worker of ``group`` sits; returns its number."""
    workers = json.loads((run.directory / "workers.json").read_text())["workers"]
    nodes = {worker["node"] for worker in workers if worker["group"] == group} - {head}
    number = next(number for number, node in cluster.nodes.items() if node["id"] in nodes)
    cluster.kill_node(number)
    return number


@pytest.mark.soak
def test_a_node_dies_and_another_takes_its_place(straight, new_run, ray_nodes, joined, same_run):
    with ray_nodes(4) as cluster:
        joined(cluster)
        run = new_run({**SPREAD, "runner.save_interval": "4"})
        process = run.start(REPLICAS)
        printed = run.read_until(process, "step    3/8")
        kill_node_of(cluster, run, "actor", cluster.nodes[0]["id"])
        rest, _ = process.communicate(timeout=600)
        printed += rest
        assert process.returncode == 0, printed
    assert "the state of step 3 was in memory" in printed and printed.count("step    4/8") == 1
    same_run(straight, run, 8, same_ranks=False)


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["rollout.train", "actor.update", "replica.write", "save.halfway", "rollout.val"])
def test_a_node_dies_in_each_phase(phase, straight, new_run, ray_nodes, joined, same_run, tmp_path, monkeypatch):
    mark = tmp_path / "reached"
    fault = {"phase": phase, "step": 4, "action": "wait", "mark": str(mark)}
    monkeypatch.setenv(faults.VARIABLE, json.dumps([fault]))  # workers have their environment from the node's raylet
    with ray_nodes(4) as cluster:
        joined(cluster)
        run = new_run({**SPREAD, "runner.save_interval": "4"})
        process = run.start(REPLICAS)
        run.read_until(process, "step    3/8")
        while not mark.exists():
            assert process.poll() is None, process.communicate()[0]
        kill_node_of(cluster, run, "actor", cluster.nodes[0]["id"])
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
    assert "was in memory" in printed
    same_run(straight, run, 8, same_ranks=False)


@pytest.mark.soak
def test_both_nodes_with_a_shard_die_at_once(straight, new_run, ray_nodes, joined, same_run):
    """The state in memory is gone, and some ranks wait for others that cannot load their part of it."""
    with ray_nodes(5) as cluster:
        joined(cluster)
        run = new_run({**SPREAD, "runner.save_interval": "2"})
        process = run.start(REPLICAS)
        printed = run.read_until(process, "step    3/8")
        for _ in range(2):
            kill_node_of(cluster, run, "actor", cluster.nodes[0]["id"])
        rest, _ = process.communicate(timeout=300)
        printed += rest
        assert process.returncode == 0, printed
    assert "in memory is damaged or gone: it is not used" in printed and "resumed from global_step_2" in printed
    same_run(straight, run, 8, same_ranks=False)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_fewer_ranks_and_more_again(algorithm, new_run, ray_nodes, joined, same_run):
    """3 -> 2 -> 3 -> 2 ranks, against one rank that nothing happened to: after every tenth step."""
    critic = {"cluster.component_placement.critic": "0"} if algorithm == "ppo" else {}
    others = (", 1 critic ranks", ", 1") if critic else ("", "")
    text = "saved by {} actor ranks" + others[0] + ", now {}" + others[1] + ": the numbers stay bit-equal"
    long = {**ALGORITHMS[algorithm], "runner.max_steps": "60", "runner.save_interval": "10"}
    alone = new_run({**long, "cluster.component_placement.actor": "0"})
    alone.finish()
    with ray_nodes(3) as cluster:
        joined(cluster)
        run = new_run({**SPREAD, **critic, **long})
        process = run.start(REPLICAS, "cluster.elastic=true", "cluster.elastic_timeout=2", "cluster.min_actor_ranks=2")
        printed = run.read_until(process, "step    3/60")
        kill_node_of(cluster, run, "actor", cluster.nodes[0]["id"])
        printed += run.read_until(process, "step    8/60")
        assert "continuing with 2 of 3 actor ranks" in printed
        assert text.format(3, 2) in printed
        cluster.add_node()
        printed = run.read_until(process, "there is room for all actor ranks again")
        printed += run.read_until(process, text.format(2, 3))
        printed += run.read_until(process, "step ")
        assert "58/60" not in printed, "it must end with 2 ranks"
        kill_node_of(cluster, run, "actor", cluster.nodes[0]["id"])
        rest, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed + rest
    assert text.format(3, 2) in rest
    same_run(alone, run, 60, same_ranks=False)
    assert alone.steps() == run.steps() and len(run.steps()) >= 6
    assert [run.digest(step) for step in run.steps()] == [alone.digest(step) for step in run.steps()]


DRAIN = """
import sys, time
import ray
from ray._raylet import GcsClient
accepted, reason = GcsClient(address=sys.argv[1]).drain_node(sys.argv[2], 2, "test", int((time.time() + 60) * 1000))
assert accepted, reason
"""


@pytest.mark.soak
def test_a_node_is_drained(straight, new_run, ray_nodes, joined, same_run, monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"phase": "rollout.train", "step": 5, "action": "hang"}]))
    with ray_nodes(3) as cluster:
        joined(cluster)
        run = new_run({**SPREAD, "runner.save_interval": "-1", "runner.max_steps": "8"})
        process = run.start()
        run.read_until(process, "step    4/8")
        order = [sys.executable, "-c", DRAIN, cluster.env["RAY_ADDRESS"], cluster.nodes[2]["id"]]
        subprocess.run(order, check=True, env={**os.environ, **cluster.env})
        printed, _ = process.communicate(timeout=600)
    assert process.returncode == EXIT_OUT_OF_TIME, printed
    assert "is being drained" in printed and run.steps() == [4]
    monkeypatch.delenv(faults.VARIABLE)
    with ray_nodes(3) as cluster:
        joined(cluster)
        run.finish("runner.resume_dir=auto")
    same_run(straight, run, 8, same_ranks=False)
