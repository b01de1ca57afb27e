"""Whose Ray it is. Ordinary processes with the command lines of Ray's; with Ray: tests/e2e/test_ray_lost.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from rlinf_lite.cluster import joining, own_ray
from rlinf_lite.cluster.errors import RayLost
from rlinf_lite.config import ClusterConfig

GCS = f"{Path(ray.__file__).parent}/core/src/ray/gcs/gcs_server"


@pytest.fixture(autouse=True)
def nobody_started_a_ray(monkeypatch):
    monkeypatch.delenv(own_ray._VARIABLE, raising=False)


@pytest.fixture
def part():
    """Makes a child of this process that looks as if the process of this id had started it as a part of Ray."""
    processes = []

    def make(starter: int) -> psutil.Process:
        session = f"--log_dir=/tmp/ray/session_2026-11-26_23-30-44_532470_{starter}/logs"
        command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)", GCS, session]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()  # before exec it has the command line of this process
        return psutil.Process(processes[-1].pid)

    yield make
    for process in processes:
        process.kill()
        process.communicate()


def test_a_cluster_that_was_joined_is_left_alone(part):
    """A container's entry point: `ray start --head ...; exec python -m rlinf_lite.main_math ...`."""
    shared = part(os.getppid()), part(os.getpid())
    own_ray.end()
    assert own_ray.roots() == [] and not own_ray.started() and all(process.is_running() for process in shared)


def test_only_the_session_that_this_driver_started_is_ended(part):
    shared, longer, own = part(os.getppid()), part(int(f"{os.getpid()}1")), part(os.getpid())
    own_ray.note_start()
    assert own_ray.roots() == [own]
    own_ray.end()
    assert not own.is_running() and shared.status() == longer.status() == psutil.STATUS_SLEEPING


def test_a_part_of_the_time_is_no_process_id():
    name = "session_2026-11-26_23-30-44_532470_1"
    text = f"--session-dir=/tmp/ray/{name} --session-name={name}"
    numbers = (1, 11, 23, 26, 30, 44, 2026, 532470, 5324701)
    assert [number for number in numbers if own_ray._session_of(number).search(text)] == [1]
    assert own_ray._session_of(1).search(text.replace(" ", "/logs "))


def test_a_new_life_still_has_its_ray_and_a_child_has_not():
    code = f"""
import os, subprocess, sys
from rlinf_lite.cluster import own_ray
print(own_ray.started(), flush=True)
if len(sys.argv) < 2:
    own_ray.note_start()
    subprocess.run([sys.executable, "-c", {"from rlinf_lite.cluster import own_ray; print(own_ray.started())"!r}])
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False", "True"]


def test_a_driver_that_starts_a_ray_has_one_even_if_it_does_not_start(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")

    def too_slow(**options: object) -> None:
        assert own_ray.started()  # a signal may come while it starts
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", too_slow)
    monkeypatch.setattr(own_ray, "adopt_orphans", lambda: None)
    with pytest.raises(RayLost, match="timed out during startup"):
        joining.connect(ClusterConfig())
    assert own_ray.started()


def test_a_driver_that_joins_has_none_any_more(monkeypatch):
    own_ray.note_start()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(joining, "_answers", lambda address: True)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    assert joining.connect(ClusterConfig()) == "127.0.0.1:6379"
    assert not own_ray.started()
