"""The fork server and its shim, with real processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private.runtime_env.context import RuntimeEnvContext

from rlinf_lite import numerics
from rlinf_lite.cluster.forks import setup_worker
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE, ForkServer, can_fork
from rlinf_lite.cluster.forks.environment import worker_env

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
PROGRAM = """
import json, os, sys, time
print(json.dumps({
    "forked": "torch" in sys.modules, "ray": "ray" in sys.modules, "pid": os.getpid(), "group": os.getpgid(0),
    "arguments": sys.argv[1:], "directory": os.getcwd(), "mark": os.environ.get("MARK"),
    "preloaded": "poplib" in sys.modules,
}), flush=True)
time.sleep(float(os.environ.get("SLEEP", "0")))
print("to the other stream", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def start(forks: ForkServer, tmp_path: Path):
    """Starts the program in place of Ray's worker, with these variables more."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def start(server: ForkServer = forks, **variables: str) -> subprocess.Popen[str]:
        command = [*shlex.split(server.python), str(tmp_path / "program.py"), "one", "t w o"]
        environment = {**os.environ, **worker_env(1, "cpu"), **variables}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> dict:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_a_worker_is_forked_and_is_a_process_as_any_other(start, tmp_path):
    process = start(MARK="set")
    worker = said(process)
    assert worker["forked"] and not worker["ray"] and worker["pid"] != process.pid
    assert worker["group"] == worker["pid"]
    assert worker["arguments"] == ["one", "t w o"] and worker["directory"] == str(tmp_path) and worker["mark"] == "set"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7 and errors == "to the other stream\n"


def test_ray_starts_workers_without_importing_itself_for_that(forks, tmp_path):
    """What a raylet runs: variables and the command in place of Python come as Ray writes them."""
    (tmp_path / "program.py").write_text(PROGRAM)
    variables = worker_env(1, "cpu") | {"MARK": "${HOME}/$ 'x'"}
    context = RuntimeEnvContext(env_vars=variables, py_executable=forks.python).serialize()
    options = [f"--serialized-runtime-env-context={context}", "--language=PYTHON"]
    worker = [str(tmp_path / "program.py"), "one", "t w o", "--node-ip-address=::1"]
    command = [sys.executable, "-v", setup_worker.__file__, *worker, *options]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "HOME": "/home"}, capture_output=True, text=True)
    seen = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 7 and seen["forked"] and seen["mark"] == "/home/$ 'x'"
    assert seen["arguments"] == worker[1:] and seen["directory"] == str(tmp_path)
    imported = {*re.findall(r"^import '(\w+)'", done.stderr, re.MULTILINE)}
    assert "json" in imported and not {"ray", "torch"} & imported


def test_what_the_driver_does_not_ask_for_is_left_to_ray(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    entrypoint = str(tmp_path / "program.py")
    context = RuntimeEnvContext(env_vars={"MARK": "x"}, override_worker_entrypoint=entrypoint).serialize()
    options = [f"--serialized-runtime-env-context={context}", "--language=PYTHON"]
    worker = [str(Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"), "one"]
    command = [sys.executable, setup_worker.__file__, *worker, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    seen = json.loads(done.stdout.splitlines()[0])
    assert done.returncode == 7 and seen["arguments"] == ["one"] and seen["mark"] == "x" and not seen["forked"]


def test_other_settings_or_no_server_start_python(start, forks, tmp_path):
    """Libraries have read the number of threads already; and on another node there is no such server."""
    process = start(**numerics.environment(threads=3))
    worker = said(process)
    assert not worker["forked"] and worker["pid"] == process.pid and process.wait(60) == 7
    lost = ForkServer(numerics.environment())
    lost.close()
    assert not said(start(lost))["forked"]


def test_a_worker_and_its_shim_end_together(start):
    process = start(SLEEP="60")
    worker = psutil.Process(said(process)["pid"])
    process.kill()
    worker.wait(10)
    process = start(SLEEP="60")
    psutil.Process(said(process)["pid"]).kill()
    assert process.wait(10) == -9 & 255


def test_a_branch_ends_with_its_driver_and_ends_its_workers(start, forks, monkeypatch):
    monkeypatch.setenv(TEMPLATE_VARIABLE, forks.name)
    branch = ForkServer(worker_env(1, "cpu"))
    assert branch.pid is None
    process = start(branch, SLEEP="60")
    worker = psutil.Process(said(process)["pid"])
    server = worker.parent()
    assert server.name() == f"forks-{os.getpid()}"
    branch.close()
    worker.wait(10)
    server.wait(10)
    assert said(start())["forked"], "the template is still there"


def test_the_driver_may_name_more_modules(start, forks, monkeypatch):
    monkeypatch.setenv(TEMPLATE_VARIABLE, forks.name)
    branch = ForkServer(worker_env(1, "cpu"))
    assert not said(start(branch))["preloaded"]
    branch.preload(["not_installed_here"])
    branch.preload(["poplib"])
    worker = said(start(branch))
    assert worker["forked"] and worker["preloaded"]
    branch.close()
    assert not said(start())["preloaded"], "the template has not imported it"


def test_ray_is_imported_with_the_variables_of_its_workers(start, forks, monkeypatch):
    """It never reads them again, so a worker with others imports it by itself."""
    monkeypatch.setenv(TEMPLATE_VARIABLE, forks.name)
    branch = ForkServer(worker_env(1, "cpu"))
    branch.preload(["ray"], {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "7"})
    theirs = {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": "7"}
    worker = said(start(branch, **theirs))
    assert worker["forked"] and worker["ray"]
    assert not said(start(branch, **theirs | {"RAY_JOB_ID": "02000000"}))["forked"]
    assert not said(start(branch, **theirs, RAY_AUTH_MODE="disabled"))["forked"]
    branch.preload(["ray"], theirs | {"RAY_RAYLET_PID": "8"})
    assert not said(start(branch, **theirs | {"RAY_RAYLET_PID": "8"}))["forked"]
    assert said(start(branch, **theirs))["forked"]
    branch.close()


@pytest.fixture
def driver(tmp_path: Path):
    """A process that has started a server: itself, and what it printed of that."""
    code = f"""
import json, sys, time
from rlinf_lite.cluster.forks.client import ForkServer
server = ForkServer({worker_env(1, "cpu")!r})
print(json.dumps({{"pid": server.pid, "python": server.python}}), flush=True)
time.sleep(60)
"""
    (tmp_path / "torch.py").write_text("raise AssertionError('a file of the working directory')")
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    with process:
        yield process, SimpleNamespace(**said(process))
        process.kill()


def test_a_server_ends_with_its_driver(driver):
    """Also while it is still importing. A driver that is killed closes nothing itself."""
    process, started = driver
    server = psutil.Process(started.pid)
    assert server.ppid() == process.pid  # its command line is empty for an instant after it began
    process.kill()
    process.wait(10)
    server.wait(10)


@pytest.mark.soak  # it imports everything anew, for a case in which runs start more slowly
def test_a_server_in_which_threads_run_does_not_fork(start):
    """As with two per worker: libraries start one when they are imported."""
    settings = worker_env(2, "cpu")
    server = ForkServer(settings)
    process = start(server, **settings)
    assert not said(process)["forked"]
    server.close()


@pytest.mark.soak  # the same
def test_files_of_the_working_directory_hide_nothing(start, driver):
    assert said(start(driver[1]))["forked"]


def test_a_machine_with_a_gpu_does_not_fork(monkeypatch):
    assert can_fork("cpu") and not can_fork("cuda")
    monkeypatch.setattr("rlinf_lite.cluster.forks.client.glob", lambda pattern: ["/dev/nvidia0"])
    assert can_fork("cpu") and not can_fork("auto")
