"""A Ray of the driver's own: which processes it has, that they end with it, and that an unknown Ray is not changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from ray._private import node, services

from rlinf_lite.cluster.small_ray import small_ray

PARTS = [
    (services, "start_ray_process"),
    (node.Node, "start_monitor"),
    (node.Node, "start_log_monitor"),
    (node.Node, "start_api_server"),
]
AGENTS = "ray::DashboardAgent", "ray::RuntimeEnvAgent"
DRIVER = """
import time
import ray
from rlinf_lite.cluster.joining import connect
from rlinf_lite.config import ClusterConfig

connect(ClusterConfig())
print(ray.get(ray.remote(lambda: "done").options(runtime_env={"env_vars": {"MARK": "x"}}).remote()), flush=True)
time.sleep(600)
"""


def parts() -> list[object]:
    return [getattr(owner, name, None) for owner, name in PARTS]


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_ray_that_is_killed_leaves_nothing_behind():
    """Raylet, GCS and driver at once: Ray's agents would tell a dead GCS for a minute."""
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, env=environment)
    everyone: list[psutil.Process] = []
    try:
        assert driver.stdout is not None and driver.stdout.readline() == "done\n"
        everyone = psutil.Process(driver.pid).children(recursive=True)
        roots = {child.name(): child for child in psutil.Process(driver.pid).children()}
        assert set(roots) == {"gcs_server", "raylet"}  # no autoscaler, no log monitor, no dashboard
        while len(agents := [child for child in everyone if child.name() in AGENTS]) < len(AGENTS):
            time.sleep(0.1)  # they take these names when they have imported Ray
        assert {agent.ppid() for agent in agents} == {roots["raylet"].pid}
        for process in (*roots.values(), driver):
            process.kill()
        driver.wait()
        psutil.wait_procs(agents, timeout=5.0)
        assert not [agent for agent in agents if lives(agent)]
        deadline = time.monotonic() + 10.0
        while (left := [process for process in everyone if lives(process)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        for process in (driver, *filter(lives, everyone)):
            process.kill()
        driver.communicate()


def test_ray_is_as_it_was_afterwards():
    before = parts()
    with small_ray():
        assert not {*before} & {*parts()}
    with pytest.raises(RuntimeError, match="did not start"), small_ray():
        raise RuntimeError("did not start")
    assert parts() == before


@pytest.mark.parametrize(("owner", "name"), PARTS)
@pytest.mark.parametrize("other", ["missing", "takes more", "no function"])
def test_an_unknown_ray_is_started_as_it_is(owner, name, other, monkeypatch):
    if other == "missing":
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, None if other == "no function" else lambda self, news: None)
    before = parts()
    with small_ray():
        assert parts() == before


def test_without_rays_module_it_is_started_as_it_is(monkeypatch):
    monkeypatch.delattr("ray._private.node")
    monkeypatch.setitem(sys.modules, "ray._private.node", None)
    before = parts()
    with small_ray():
        assert parts() == before
