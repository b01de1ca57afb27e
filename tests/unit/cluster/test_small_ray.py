"""A Ray of the driver's own: which processes it has, that they end with it, and that an unknown Ray is not changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from subprocess import list2cmdline
from types import SimpleNamespace

import psutil
import pytest
from ray import _raylet
from ray._private import node, services

from rlinf_lite.cluster import idle_agent
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE
from rlinf_lite.cluster.small_ray import _AGENTS, _SETUP_WORKER, small_ray

PARTS = [
    (services, "start_ray_process"),
    (node.Node, "start_monitor"),
    (node.Node, "start_log_monitor"),
    (node.Node, "start_api_server"),
]
AGENTS = "ray::DashboardAgent", "ray::RuntimeEnvAgent"
DRIVER = """
import sys, time
import ray
from rlinf_lite.cluster.forks.client import ForkServer
from rlinf_lite.cluster.joining import connect
from rlinf_lite.cluster.forks.environment import worker_env
from rlinf_lite.config import ClusterConfig

config = ClusterConfig()
forks = ForkServer(worker_env(config.threads_per_worker, "cpu") | {"MARK": "all"}) if sys.argv[1] == "forked" else None
connect(config, forks=forks)

@ray.remote
def mark():
    import os, sys
    return os.environ.get("MARK"), "rlinf_lite.cluster.workers.policy_worker" in sys.modules

asked = {"runtime_env": {"env_vars": {"MARK": "asked"}}}
print(*ray.get(mark.options(**({} if forks else asked)).remote()), flush=True)
if forks:
    try:
        ray.get(mark.options(**asked).remote())
    except ray.exceptions.RuntimeEnvSetupError as error:
        print("a Ray of rlinf_lite's own has no runtime environments" in str(error), flush=True)
    print(*ray.get(mark.remote()), flush=True)
time.sleep(600)
"""


def parts() -> list[object]:
    return [getattr(owner, name, None) for owner, name in PARTS]


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def started(forks):
    """Starts a driver with a Ray of its own; returns both, and what the driver has printed."""
    drivers: list[subprocess.Popen[str]] = []

    def start(how: str, num_lines: int) -> tuple[subprocess.Popen[str], list[psutil.Process], list[str]]:
        environment = {**os.environ, "RAY_ADDRESS": "local", TEMPLATE_VARIABLE: forks.name}
        command = [sys.executable, "-c", DRIVER, how]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        drivers.append(driver)
        assert driver.stdout is not None
        lines = [driver.stdout.readline().strip() for _ in range(num_lines)]
        return driver, psutil.Process(driver.pid).children(recursive=True), lines

    yield start
    for driver in drivers:
        for process in psutil.Process(driver.pid).children(recursive=True):
            process.kill()
        driver.kill()
        driver.communicate()


def is_gone(processes: list[psutil.Process], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(lives, processes))


def kill_all(driver: subprocess.Popen[str], processes: list[psutil.Process]) -> None:
    """Raylet, GCS and driver at once: Ray's agents would tell a dead GCS for a minute."""
    for process in (*(found for found in processes if found.ppid() == driver.pid), driver):
        process.kill()


def test_a_ray_that_is_killed_leaves_nothing_behind(started):
    driver, everyone, lines = started("asked", 1)
    assert lines == ["asked False"]
    roots = {child.name(): child for child in everyone if child.ppid() == driver.pid}
    assert set(roots) == {"gcs_server", "raylet"}  # no autoscaler, no log monitor, no dashboard
    while len(agents := [child for child in everyone if child.name() in AGENTS]) < len(AGENTS):
        time.sleep(0.1)  # they take these names when they have imported Ray
    assert {agent.ppid() for agent in agents} == {roots["raylet"].pid}
    kill_all(driver, everyone)
    # Ray itself lets a process ask a dead GCS again for a minute (gcs_rpc_server_reconnect_timeout_s).
    assert is_gone(agents, 5.0) and is_gone(everyone, 70.0)


def test_where_all_workers_are_forked_agents_are_idle(started):
    driver, everyone, lines = started("forked", 3)
    assert lines == ["all True", "True", "all True"], "the refusal ends neither the raylet nor its workers"
    agents = [child for child in everyone if idle_agent.__file__ in child.cmdline()]
    assert len(agents) == 2 and all(agent.cpu_times().user < 0.3 for agent in agents)
    assert not [child for child in everyone if child.name() in AGENTS]
    kill_all(driver, everyone)
    assert is_gone(agents, 5.0) and is_gone(everyone, 10.0)


def test_a_raylet_that_is_not_the_known_one_keeps_its_agents(forks, monkeypatch):
    worker, *agents = known = [
        f"--python_worker_command={list2cmdline([sys.executable, str(_SETUP_WORKER)])} worker.py",
        *(f"{name}={sys.executable} agent.py" for name in _AGENTS),
    ]
    started: list[tuple[list[str], dict[str, str] | None]] = []
    orders: list[dict[str, str]] = []

    def start(command, process_type, fate_share, env_updates=None):
        started.append((command, env_updates))
        return SimpleNamespace(process=SimpleNamespace(pid=7))

    def is_forking(command: list[str]) -> bool:
        monkeypatch.setattr(forks, "starts_all_workers", False)
        with small_ray(forks):
            services.start_ray_process(command, "raylet", True)
        changed = [idle_agent.__file__ in text for text in started[-1][0]]
        assert changed == [forks.starts_all_workers and text in agents for text in command]
        assert started[-1][1] == (forks.environment if forks.starts_all_workers else None)
        assert [order["RAY_RAYLET_PID"] for order in orders] == ["7"] * forks.starts_all_workers
        orders.clear()
        return forks.starts_all_workers

    monkeypatch.setattr(services, "start_ray_process", start)
    monkeypatch.setattr(forks, "preload", lambda modules, environment: orders.append(environment))
    assert is_forking(known)
    assert not is_forking(agents) and not is_forking(known[:2])
    assert not is_forking([worker.replace("setup_worker", "other"), *agents])
    monkeypatch.setattr(services, "start_ray_process", lambda command, process_type, fate_share, env_updates=None: None)
    with small_ray(forks):
        assert services.start_ray_process(known, "raylet", True) is None
    assert not orders, "a raylet whose process is not known is started all the same"
    monkeypatch.setattr(services, "start_ray_process", start)
    monkeypatch.setattr(_raylet, "ANOTHER_PORT_NAME", "another_port", raising=False)
    assert not is_forking(known)


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
