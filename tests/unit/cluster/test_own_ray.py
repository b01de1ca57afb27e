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
    monkeypatch.setattr(own_ray, "_starter", None)
    monkeypatch.setattr(own_ray, "MODULE", "other_fork_servers")  # not the one of this process, which other tests need


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
    assert not own_ray.started() and all(process.is_running() for process in shared)


def test_only_the_session_that_this_driver_started_is_ended(part):
    shared, longer, own = part(os.getppid()), part(int(f"{os.getpid()}1")), part(os.getpid())
    own_ray.note_start()
    assert own_ray.roots(os.getpid()) == [own]
    own_ray.end()
    assert not own.is_running() and shared.status() == longer.status() == psutil.STATUS_SLEEPING


def test_a_part_of_the_time_is_no_process_id():
    name = "session_2026-11-26_23-30-44_532470_1"
    text = f"--session-dir=/tmp/ray/{name} --session-name={name}"
    numbers = (1, 11, 23, 26, 30, 44, 2026, 532470, 5324701)
    assert [number for number in numbers if own_ray._session_of(number).search(text)] == [1]
    assert own_ray._session_of(1).search(text.replace(" ", "/logs "))


def test_the_ray_of_a_driver_that_has_ended_is_ended_by_its_process_id(part):
    """The parent process has become the parent of what a killed driver leaves behind."""
    other, left = part(os.getpid()), part(4711)
    own_ray.end_of(4711)
    assert not left.is_running() and other.is_running()


def test_a_forked_child_has_no_ray():
    own_ray.note_start()
    if (child := os.fork()) == 0:
        os._exit(own_ray.started())
    assert own_ray.started() and os.waitpid(child, 0)[1] == 0


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
