"""One driver per run directory: who is refused, who takes over, and what outlives the holder; with real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import runpy
import signal
import socket
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from rlinf_lite.errors import ConfigError
from rlinf_lite.recovery import lock
from rlinf_lite.recovery.lock import hold
from rlinf_lite.runner.failures import explain

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from rlinf_lite.recovery.lock import hold
with hold(Path(sys.argv[1])):
"""
WAIT = "    print('held', flush=True); time.sleep(60)\n"
START_A_CHILD = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
"""
FORK_A_CHILD = """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    print(child, flush=True)
"""
REEXECUTE = """
    if len(sys.argv) == 2:
        print("first", os.getpid(), flush=True)
        os.execv(sys.executable, [sys.executable, "-c", Path(sys.argv[1], "code").read_text(), sys.argv[1], "again"])
    print("again", os.getpid(), flush=True)
"""


PATIENCE_SECONDS = lock._PATIENCE_SECONDS


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.1)


class Program:
    """Python code with a directory as its argument, in a process forked from one that has imported what it needs."""

    def __init__(self, context: BaseContext, file: Path, code: str, directory: Path) -> None:
        file.write_text(f"import os, sys\nos.dup2(OUTPUT.fileno(), 1)\nOUTPUT.close()\nsys.argv = ARGUMENTS\n{code}")
        mine, theirs = context.Pipe(duplex=False)
        given = {"OUTPUT": theirs, "ARGUMENTS": ["", str(directory)]}
        self._process = context.Process(target=runpy.run_path, args=(str(file), given, "forked"))
        self._process.start()
        theirs.close()
        self.stdout = os.fdopen(os.dup(mine.fileno()))
        mine.close()
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture
def start(fork_server, tmp_path, tmp_path_factory):
    """Start Python code with the directory as its argument; ended with the test."""
    programs, files = [], tmp_path_factory.mktemp("programs")

    def run(code: str) -> Program:
        programs.append(Program(fork_server, files / f"{len(programs)}.py", code, tmp_path))
        return programs[-1]

    yield run
    for program in programs:
        program.kill()
        program.stdout.close()


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as error, hold(directory):
        pass
    return str(error.value)


def next_line(process: Program) -> str:
    return process.stdout.readline().strip()


def test_the_holder_is_named(tmp_path, start):
    before = time.time()
    holder = start(HOLD + WAIT)
    assert next_line(holder) == "held"
    named = (
        rf"in use by process {holder.pid} on {re.escape(socket.gethostname())} since (\S+ \S+) UTC; wait for its end"
    )
    found = re.search(named, refusal(tmp_path))
    assert found
    since = time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S")) - time.timezone
    assert before - 1 <= since <= time.time()
    assert "runner.output_dir" in refusal(tmp_path) and "another runner.experiment_name" in refusal(tmp_path)


def test_a_killed_holder_holds_nothing(tmp_path, start, capfd):
    holder = start(HOLD + WAIT)
    next_line(holder)
    holder.kill()
    assert f"process {holder.pid} " in (tmp_path / ".lock").read_text()  # stale
    with hold(tmp_path):
        assert f"process {os.getpid()} on {socket.gethostname()}" in refusal(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path, start, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", PATIENCE_SECONDS)
    holder = start(HOLD + "    print('held', flush=True); time.sleep(0.2)\n")
    next_line(holder)
    with hold(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_longer_name_leaves_nothing_behind(tmp_path):
    (tmp_path / ".lock").write_text("x" * 500)
    with hold(tmp_path):
        assert re.fullmatch(r"process \d+ on \S+ since \S+ \S+ UTC\n", (tmp_path / ".lock").read_text())


@pytest.mark.parametrize("child", [START_A_CHILD, FORK_A_CHILD], ids=["started", "forked"])
def test_a_child_does_not_keep_it(tmp_path, start, child):
    holder = start(HOLD + child + WAIT)
    orphan = int(next_line(holder))
    assert next_line(holder) == "held"
    try:
        assert f"process {holder.pid} " in refusal(tmp_path)  # nor does it take it away from the living
        holder.kill()
        os.kill(orphan, 0)
        with hold(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_the_holder_may_reexecute_itself(tmp_path, start):
    (tmp_path / "code").write_text(HOLD + REEXECUTE + WAIT)
    holder = start(HOLD + REEXECUTE + WAIT)
    assert next_line(holder) == f"first {holder.pid}"
    assert next_line(holder) == f"again {holder.pid}"
    assert next_line(holder) == "held"
    assert f"process {holder.pid} " in refusal(tmp_path)


def test_a_refused_one_leaves_the_holder_alone(tmp_path, start):
    holder = start(HOLD + WAIT)
    next_line(holder)
    name = (tmp_path / ".lock").read_text()
    assert refusal(tmp_path) == refusal(tmp_path)
    assert (tmp_path / ".lock").read_text() == name
    held = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert str((tmp_path / ".lock").resolve()) not in held


def test_it_is_given_back(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_it_says_what_is_not_protected(tmp_path, monkeypatch, capsys, number):
    def flock(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path):
        said = capsys.readouterr().out
        assert f"{tmp_path}: its file system has no locks ({os.strerror(number)})" in said
        assert "second run in this directory would not be refused" in said and said.count("\n") == 1
        with hold(tmp_path):
            pass
    assert lock._held == set()


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_its_place_is_not_followed(tmp_path, there):
    target = tmp_path / "precious"
    if there:
        target.write_text("years of work")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError) as caught, hold(tmp_path):
        pass
    message, code = explain(caught.value)
    assert code == 2 and message is not None
    assert f"{tmp_path / '.lock'}: is a symbolic link to {target}, and is not written to; remove it first" in message
    assert target.exists() == there and (not there or target.read_text() == "years of work")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_ordinary_file_is_named(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(OSError, match=r"is (no ordinary file|a directory), and is not written to"), hold(tmp_path):
        pass


def test_it_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


RACE = """
import os, sys, time
from pathlib import Path
from rlinf_lite.errors import ConfigError
from rlinf_lite.recovery.lock import hold
directory, number = Path(sys.argv[1]), 0
end = time.monotonic() + 3
while time.monotonic() < end:
    try:
        with hold(directory):
            os.close(os.open(directory / "alone", os.O_CREAT | os.O_EXCL))  # fails where two hold it
            os.unlink(directory / "alone")
            number += 1
    except ConfigError:
        pass
print(number, flush=True)
"""


def test_two_never_hold_it_though_it_is_removed_each_time(tmp_path, start):
    counts = [int(next_line(process)) for process in [start(RACE), start(RACE), start(RACE)]]
    assert sum(counts) > 0 and list(tmp_path.iterdir()) == []


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def flock(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), hold(tmp_path):
        pass
