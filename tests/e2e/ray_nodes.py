"""A Ray cluster of several nodes on this machine, whose nodes can be killed and added; drivers join it by its ``env``.

It runs in a process of its own (this file as a program, one JSON line per order), with its own temporary directory and
token: the tests' process stays free of Ray's settings, and no other driver on the machine finds this cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# With Ray's defaults a killed node is noticed after 10-20 s.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class RayNodes:
    """Node 0 is the head: it has the GCS, and drivers on this machine attach to it."""

    server: subprocess.Popen[str]
    directory: Path
    """Ray's temporary directory: on the command line of each of its processes."""
    env: dict[str, str]
    """What a driver needs in its environment to join."""
    nodes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """``id`` (Ray's node id) and ``raylet`` (process id) of each living node by its number."""
    gcs: int = 0
    """Process id of the GCS."""

    def ask(self, **order: Any) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        if not (answer := self.server.stdout.readline()):
            raise RuntimeError(f"the cluster's process ended while it was asked for {order}")
        return json.loads(answer)

    def add_node(self, num_cpus: float = 1, num_gpus: int = 0) -> int:
        """Start one more node; returns its number when the cluster knows it."""
        answer = self.ask(do="add", num_cpus=num_cpus, num_gpus=num_gpus)
        if not self.nodes:
            self.env["RAY_ADDRESS"], self.gcs = answer["address"], answer["gcs"]
        self.nodes[answer["number"]] = answer
        return answer["number"]

    def processes(self, number: int) -> list[psutil.Process]:
        """A node's workers and agents; none if its raylet is dead."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.nodes[number]["raylet"]).children(recursive=True)
        return []

    def kill_node(self, number: int) -> float:
        """kill -9 of the node's raylet; returns after how many seconds the last of its workers had ended by itself."""
        below = self.processes(number)
        started = time.monotonic()
        self.ask(do="kill", number=number)
        del self.nodes[number]
        _, alive = psutil.wait_procs(below, timeout=15)
        for process in alive:
            process.kill()
        assert not alive, f"workers outlived their node: {alive}"
        return time.monotonic() - started

    def end(self) -> None:
        """End every process of every node, by id."""
        assert self.server.stdin is not None
        below = [process for number in self.nodes for process in self.processes(number)]
        self.server.stdin.close()
        self.server.wait(timeout=60)
        late = (found for found in psutil.process_iter(["cmdline"]) if self._started_for(found))
        for process in (*below, *late):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _started_for(self, process: psutil.Process) -> bool:
        return any(str(self.directory) in word for word in process.info["cmdline"] or ())


@contextmanager
def ray_nodes(
    num_nodes: int, num_cpus_each: float = 1, extra_env: dict[str, str] | None = None, num_gpus_each: int = 0
) -> Iterator[RayNodes]:
    """A cluster of so many nodes; ends with everything that runs on it.

    Args:
        num_cpus_each, num_gpus_each: of each node, as told to Ray: locations, not cores or devices.
        extra_env: Ray's settings (``RAY_...``) of cluster and drivers.
    """
    directory = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # short: a socket's path has at most 107 characters
    joining = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, **QUICK_HEALTH_CHECKS, **(extra_env or {})}
    env = {**os.environ, **joining, "RAY_TMPDIR": str(directory)}
    with (directory / "cluster.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
        )
    cluster = RayNodes(server, directory, joining)
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus_each, num_gpus_each)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(directory, ignore_errors=True)


def _serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever Ray prints belongs into the log

    from ray.cluster_utils import Cluster

    cluster = Cluster()
    nodes: list[Any] = []
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "add":
            node = cluster.add_node(num_cpus=order["num_cpus"], num_gpus=order["num_gpus"], include_dashboard=False)
            nodes.append(node)
            raylet = node.all_processes["raylet"][0].process.pid
            gcs = cluster.head_node.all_processes["gcs_server"][0].process.pid
            answer = {"number": len(nodes) - 1, "id": node.node_id, "raylet": raylet}
            answer |= {"address": cluster.address, "gcs": gcs}
        else:
            raylet = nodes[order["number"]].all_processes["raylet"][0].process
            raylet.kill()
            raylet.wait()  # a raylet that nobody reaps looks alive to its workers, and they stay
            answer = {}
        print(json.dumps(answer), file=answers, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _serve()
