"""Stacks of Ray actors on several nodes, one of them stopped; and their end by pid, which Ray notices."""

from __future__ import annotations

import os
import signal
import time

import pytest

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from rlinf_lite.cluster import stacks  # noqa: E402

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]


class Worker:
    def __init__(self) -> None:
        stacks.enable()

    def location(self) -> tuple[str, stacks.Process]:
        return ray.get_runtime_context().get_node_id(), stacks.me()

    def hangs_here(self) -> None:
        time.sleep(600)


@pytest.fixture
def cluster():
    """Two raylets; the driver is on the first."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "resources": {"first": 1}},
    )
    cluster.add_node(num_cpus=2, resources={"second": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def spawn(resource: str):
    worker = ray.remote(Worker).options(num_cpus=0, resources={resource: 0.1}).remote()
    return worker, *ray.get(worker.location.remote())


def test_hung_actors_of_two_nodes_are_read_and_ended(cluster):
    here, other = spawn("first"), spawn("second")
    assert here[1] == ray.get_runtime_context().get_node_id() != other[1]
    calls = [worker.hangs_here.remote() for worker, _, _ in (here, other)]
    time.sleep(1)
    nodes = {node: [process] for _, node, process in (here, other)}
    for _, _, process in (here, other):
        os.kill(process.pid, signal.SIGSTOP)
    found = stacks.collect_on(nodes)
    assert list(found) == list(nodes)
    for (stack,), (process,) in zip(found.values(), nodes.values(), strict=True):
        assert (stack.pid, stack.state) == (process.pid, "stopped")
        assert "in hangs_here" in stack.text

    for _, _, process in (here, other):  # not only sleeping ones end
        os.kill(process.pid, signal.SIGSTOP)
    assert stacks.end_on(nodes) == {}
    for call in calls:
        began = time.monotonic()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(call, timeout=30)
        assert time.monotonic() - began < 10


def test_a_node_that_is_gone_or_deaf_is_said_to_be(cluster):
    _, node, process = spawn("second")
    raylet = cluster.worker_nodes.copy().pop()
    pid = raylet.all_processes["raylet"][0].process.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    (stack,) = stacks.collect_on({node: [process]}, seconds=2.0)[node]
    assert time.monotonic() - began < 10
    assert (stack.pid, stack.state) == (process.pid, "unknown")
    assert stack.text == f"node {node} does not answer: nothing in 2 s"
    assert list(stacks.end_on({node: [process]}, seconds=2.0)) == [node]

    os.kill(pid, signal.SIGCONT)
    cluster.remove_node(raylet, allow_graceful=False)
    deadline = time.monotonic() + 60
    while any(entry["Alive"] for entry in ray.nodes() if entry["NodeID"] == node):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    began = time.monotonic()
    (stack,) = stacks.collect_on({node: [process]}, seconds=60.0)[node]
    assert time.monotonic() - began < 30  # not waited for
    assert stack.state == "unknown"
    assert stack.text.startswith(f"node {node} does not answer: ")
