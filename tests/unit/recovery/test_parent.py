"""The parent process: when a driver is started again, signals, and what a killed driver or parent leaves behind.

Real processes with small drivers of their own; with whole runs: tests/e2e/test_parent.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlinf_lite.errors import EXIT_INTERRUPTED, EXIT_OUT_OF_TIME, EXIT_WORKER_LOST
from rlinf_lite.parent import driver_command, max_restarts_of

PARENT = """
import sys
from rlinf_lite.parent import Parent
sys.exit(Parent([sys.executable, "-c", *sys.argv[1:]]).run())
"""
PRELUDE = """
import json, os, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.recovery.restarts import budget_for

link = ParentLink.connect()
directory = Path(sys.argv[1])
life = len(list(directory.glob("life*")))
(directory / f"life{life}").write_text(json.dumps({"pid": os.getpid(), **asdict(link.handover)}))

def read_config(max_restarts=10):
    link.report(budget=budget_for(max_restarts, 3600.0, link.handover.budget).to_json())

def build(step=0):
    read_config()
    link.report(is_built=True, step=step)

def die(number):
    os.kill(os.getpid(), number)
    time.sleep(60)

def leave(code):
    link.report(exit_code=code)
    os._exit(code)

def ready():
    print("ready", flush=True)
"""


class Family:
    """A parent, and the drivers that it has started."""

    def __init__(self, directory: Path, driver: str, *arguments: str, **options: object) -> None:
        self.directory = directory
        command = [sys.executable, "-c", PARENT, PRELUDE + driver, str(directory), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, start_new_session=True, **{**pipes, **options})

    def wait_until_ready(self) -> None:
        assert self.process.stdout.readline() == "ready\n"

    def end(self, seconds: float = 60.0) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    @property
    def lives(self) -> list[dict]:
        """What each driver was handed over, with its process id."""
        return [json.loads(path.read_text()) for path in sorted(self.directory.glob("life*"))]


@pytest.fixture
def start(tmp_path):
    families = []

    def make(driver: str, *arguments: str, **options: object) -> Family:
        families.append(Family(tmp_path, driver, *arguments, **options))
        return families[-1]

    yield make
    for family in families:
        family.process.kill()
        family.process.communicate()


# -- which ends are final


@pytest.mark.parametrize(
    "code",
    [
        0,
        EXIT_WORKER_LOST,
        *(pytest.param(n, marks=pytest.mark.soak) for n in (1, 2, EXIT_OUT_OF_TIME, EXIT_INTERRUPTED)),
    ],
)
def test_an_end_in_order_is_final(start, code):
    family = start(f"build()\nleave({code})")
    assert family.end() == (code, "", "") and len(family.lives) == 1


def test_a_crash_after_the_end_changes_nothing(start):
    family = start("build()\nlink.report(exit_code=0)\ndie(signal.SIGSEGV)")
    assert family.end()[0] == 0 and len(family.lives) == 1


def test_a_driver_that_python_cannot_start_is_not_tried_again(start):
    family = start("import nowhere")
    code, _, err = family.end()
    assert code == 1 and "No module named 'nowhere'" in err and len(family.lives) == 1


@pytest.mark.parametrize(
    ("death", "text"),
    [
        ("die(signal.SIGKILL)", "the driver was killed by SIGKILL"),
        ("die(signal.SIGSEGV)", "the driver was killed by SIGSEGV"),
        ("os._exit(1)", "the driver ended with exit code 1 in the middle of the run"),
    ],
)
def test_a_driver_that_dies_is_started_again(start, death, text):
    family = start(f"build(step=3)\nlink.report(address='10.0.0.1:6379')\nif life == 0: {death}\nleave(0)")
    code, out, err = family.end()
    restart = "   starting the driver again, with 3 steps completed (restart 1 of 10)\n"
    assert (code, out, err) == (0, f"!! {text}\n{restart}", "")
    first, second = family.lives
    assert (first["restart"], first["was_built"], first["address"], first["budget"]) == ("", False, None, None)
    assert (second["restart"], second["was_built"], second["address"]) == (text, True, "10.0.0.1:6379")
    assert second["started"] == first["started"] and len(json.loads(second["budget"])["restarts"]) == 1


def test_a_death_before_the_run_is_built_leaves_the_start_as_it_was(start):
    family = start("if life == 0: die(signal.SIGKILL)\nread_config()\nif life == 1: die(signal.SIGKILL)\nleave(0)")
    assert family.end()[0] == 0
    assert [life["was_built"] for life in family.lives] == [False, False, False]


def test_what_was_built_once_stays_built(start):
    family = start("if life == 0: build()\nif life < 2: die(signal.SIGKILL)\nleave(0)")
    assert family.end()[0] == 0
    assert [life["was_built"] for life in family.lives] == [False, True, True]


def test_a_lost_ray_is_a_reason_to_start_again(start):
    family = start("build()\nif life == 0:\n    link.report(ray_lost='the raylet is gone')\n    os._exit(3)\nleave(0)")
    code, out, _ = family.end()
    assert code == 0 and out.startswith("!! Ray was lost: the raylet is gone\n   starting the driver again")
    assert family.lives[1]["restart"] == "Ray was lost: the raylet is gone"


# -- budgets


def test_the_same_death_at_the_same_step_is_given_up(start):
    family = start("build(step=7)\ndie(signal.SIGKILL)")
    code, _, err = family.end()
    assert code == EXIT_WORKER_LOST and len(family.lives) == 3
    assert err.startswith("error: the driver was killed by SIGKILL\nerror: this happened 3 times in a row with 7 steps")
    assert err.endswith("Nothing that was committed is lost.\n")


def test_deaths_with_progress_use_up_the_budget(start):
    family = start("read_config(max_restarts=4)\nlink.report(is_built=True, step=life)\ndie(signal.SIGKILL)")
    code, _, err = family.end()
    assert code == EXIT_WORKER_LOST and len(family.lives) == 5 and "runner.max_restarts=4" in err


def test_without_restarts_the_first_death_is_the_end(start):
    family = start("read_config(max_restarts=0)\ndie(signal.SIGKILL)")
    code, _, err = family.end()
    assert code == EXIT_WORKER_LOST and len(family.lives) == 1 and "runner.max_restarts=0: the run is not" in err


def test_what_a_driver_spends_inside_counts(start):
    spend = """
budget = budget_for(3, 3600.0, link.handover.budget)
for _ in range(2): budget.admit(step=life, cause="a worker was lost", death=True)
link.report(budget=budget.to_json(), is_built=True, step=life)
die(signal.SIGKILL)
"""
    family = start(spend)
    code, out, _ = family.end()
    assert "(restart 3 of 3)" in out and code != 0
    assert len(json.loads(family.lives[1]["budget"])["restarts"]) == 3


def test_a_driver_that_dies_before_it_reads_its_config_is_given_up_too(start):
    family = start("die(signal.SIGKILL)")
    code, _, err = family.end()
    assert code == EXIT_WORKER_LOST and len(family.lives) == 3 and "with 0 steps completed" in err


def test_without_restarts_on_the_command_line_a_death_before_the_config_is_read_is_the_end(start):
    family = start("die(signal.SIGKILL)", "runner.max_restarts=0")
    code, _, err = family.end()
    assert code == EXIT_WORKER_LOST and len(family.lives) == 1 and "runner.max_restarts=0: the run is not" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], 10),
        (["runner.max_restarts=0"], 0),
        (["++runner.max_restarts=3"], 3),
        (["runner.max_restarts=0", "runner.max_restarts=4", "runner.max_steps=8"], 4),
        (["runner.max_restarts=some"], 10),
    ],
)
def test_the_restarts_that_the_command_line_allows(arguments, expected):
    assert max_restarts_of(["python", "-m", "rlinf_lite.driver", "grpo-tiny-arithmetic", *arguments]) == expected


# -- signals

STOPS = """
got = []
def note(number, frame):
    got.append(number)
    os.write(1, (signal.Signals(number).name + "\\n").encode())  # whole, if another signal interrupts it
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, note)
"""
SAVES = f"{STOPS}\nbuild()\nready()\nwhile not got: time.sleep(0.01)\ntime.sleep(0.5)\nleave(75)"
HANGS = f"{STOPS}\nbuild()\nready()\ntime.sleep(60)"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak), signal.SIGINT]
)
def test_a_stop_signal_is_forwarded_and_the_driver_waited_for(start, number):
    family = start(SAVES)
    family.wait_until_ready()
    family.process.send_signal(number)
    assert family.end() == (75, f"{signal.Signals(number).name}\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_OUT_OF_TIME), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_a_second_signal_ends_the_driver_at_once(start, number, code):
    family = start(HANGS)
    family.wait_until_ready()
    family.process.send_signal(number)
    time.sleep(0.5)
    assert family.process.poll() is None
    family.process.send_signal(signal.SIGTERM)
    ended, _, err = family.end(20.0)
    assert ended == code and "ended without waiting" in err and len(family.lives) == 1


def test_ctrl_c_reaches_the_whole_group_and_is_one_request(start):
    family = start(SAVES)
    family.wait_until_ready()
    os.killpg(family.process.pid, signal.SIGINT)
    code, out, err = family.end()
    assert (code, err) == (75, "") and out in ("SIGINT\n", "SIGINT\nSIGINT\n")


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)])
def test_a_request_that_is_sent_twice_is_one(start, second):
    family = start(SAVES)
    family.wait_until_ready()
    family.process.send_signal(signal.SIGSTOP)  # both signals then reach it at once, however busy the machine is
    family.process.send_signal(signal.SIGTERM)
    family.process.send_signal(second)
    family.process.send_signal(signal.SIGCONT)
    code, out, err = family.end()
    assert (code, err) == (75, "")
    assert out in ("SIGTERM\n", f"{second.name}\n")  # of two that wait, the system chooses which handler runs first


def test_a_driver_that_is_starting_is_given_a_second(start):
    family = start(f"{STOPS}\nread_config()\nready()\ntime.sleep(60)")
    family.wait_until_ready()
    family.process.send_signal(signal.SIGUSR1)
    code, out, _ = family.end(20.0)
    assert (code, out) == (EXIT_OUT_OF_TIME, "SIGUSR1\n") and len(family.lives) == 1


def test_a_signal_to_a_driver_without_handlers_is_a_stop(start):
    family = start("ready()\ntime.sleep(60)")
    family.wait_until_ready()
    family.process.send_signal(signal.SIGTERM)
    assert family.end()[0] == EXIT_OUT_OF_TIME and len(family.lives) == 1


def test_a_driver_that_stops_on_a_signal_of_its_own_is_not_started_again(start):
    family = start("from rlinf_lite.runner.signals import end_at_once\nend_at_once()\ndie(signal.SIGTERM)")
    code, _, err = family.end()
    assert (code, err) == (EXIT_OUT_OF_TIME, "SIGTERM: stopped, there was nothing to save\n")
    assert len(family.lives) == 1


def test_no_driver_is_started_again_after_a_stop_request(start):
    family = start(f"{STOPS}\nbuild()\nready()\nwhile not got: time.sleep(0.01)\ndie(signal.SIGKILL)")
    family.wait_until_ready()
    family.process.send_signal(signal.SIGTERM)
    assert family.end()[0] == EXIT_OUT_OF_TIME and len(family.lives) == 1


def test_a_request_to_save_waits_until_there_is_something_to_save(start):
    until_sent = "while not (directory / 'sent').exists(): time.sleep(0.01)\ntime.sleep(0.3)\nprint(got, flush=True)"
    family = start(f"{STOPS}\nready()\n{until_sent}\nbuild()\nwhile not got: time.sleep(0.01)\nleave(0)")
    family.wait_until_ready()
    family.process.send_signal(signal.SIGUSR2)
    (family.directory / "sent").touch()
    assert family.end() == (0, "[]\nSIGUSR2\n", "")


def test_what_is_ignored_stays_ignored(start):
    family = start(f"{STOPS}\nbuild()\nready()\ntime.sleep(1)\nleave(0)", preexec_fn=ignore_ctrl_c)
    family.wait_until_ready()
    os.killpg(family.process.pid, signal.SIGINT)
    assert family.end() == (0, "", "")


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -- nothing is left behind


def test_a_driver_notices_that_its_parent_was_killed(start, tmp_path):
    busy = "import hashlib\nwhile True: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6)"
    watch = "from rlinf_lite.runner.signals import end_without_parent\nlink.watch(end_without_parent)"
    family = start(f"{watch}\nready()\n{busy}")
    family.wait_until_ready()
    driver = psutil.Process(family.lives[0]["pid"])
    family.process.kill()
    psutil.wait_procs([driver], timeout=20)
    assert not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE
    assert family.process.stderr.read() == "the parent process is gone: the driver ends\n"


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found on Linux only")
def test_the_ray_of_a_killed_driver_is_ended(start, tmp_path):
    ray_part = """
import importlib.util
gcs = f"{Path(importlib.util.find_spec('ray').origin).parent}/core/src/ray/gcs/gcs_server"
name = f"--log_dir=/tmp/ray/session_2026-11-26_23-30-44_532470_{os.getpid()}/logs"
sleep = "print(flush=True); import time; time.sleep(600)"
part = subprocess.Popen([sys.executable, "-c", sleep, gcs, name], stdout=subprocess.PIPE)
part.stdout.readline()
(directory / "part").write_text(str(part.pid))
"""
    family = start(f"if life == 1: leave(0)\nbuild()\n{ray_part}\ndie(signal.SIGKILL)")
    assert family.end()[0] == 0
    assert not psutil.pid_exists(int((tmp_path / "part").read_text()))


# -- the driver's command


@pytest.mark.parametrize(
    ("command", "driver"),
    [
        (["python", "-u", "-m", "rlinf_lite.main_math", "a=1"], ["-u", "-m", "rlinf_lite.driver", "a=1"]),
        (["python", "-Pm", "rlinf_lite.main_math", "a=1"], ["-Pm", "rlinf_lite.driver", "a=1"]),
        (["python", "/x/rlinf_lite/main_math.py", "a=1"], ["-m", "rlinf_lite.driver", "a=1"]),
        (["python", "-X", "dev", "/x/main_math.py", "-m"], ["-X", "dev", "-m", "rlinf_lite.driver", "-m"]),
    ],
)
def test_the_driver_gets_the_interpreters_options_and_every_argument(command, driver):
    assert driver_command(command, 1) == [sys.executable, *driver]
