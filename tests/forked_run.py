"""A run's parent and driver in forked processes, as if Python had been started for each: see `Run.start`.

Both are what a user has: processes with ids, signals, pipes and an end of their own. They differ in their beginning
only: libraries have been imported before. Run as a script (by `runpy`, in a new process), this file is the parent.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import NoReturn

_NAME = 15
"""Of `prctl`: the name that process lists show."""


class ForkedProcess:
    """A forked run, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, context: BaseContext, command: list[str], environment: dict[str, str]) -> None:
        """
        Args:
            context: of a fork server that has imported what a driver imports.
            command: as for `subprocess.Popen`: Python, its options, ``-m``, the module of the parent, arguments.
        """
        mine, theirs = context.Pipe(duplex=False)
        task = {"COMMAND": command, "ENVIRONMENT": environment, "OUTPUT": theirs}
        self._process: BaseProcess = context.Process(target=runpy.run_path, args=(__file__, task, "forked"))
        self._process.start()
        theirs.close()
        self.stdout = os.fdopen(os.dup(mine.fileno()))
        mine.close()
        self._polling = threading.Lock()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with self._polling:  # the exit code can be read once
            return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it still prints until everybody has closed the pipe, as `subprocess.Popen.communicate`."""
        with ThreadPoolExecutor(1) as reader:
            reading = reader.submit(self.stdout.read)
            try:
                printed = reading.result(timeout)
            except TimeoutError:
                self.kill()
                raise
        self.wait(timeout or 60)
        return printed, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be the Python that ``command`` starts, up to its module."""
    module = command.index("-m") + 1
    ctypes.CDLL(None).prctl(_NAME, command[module].removeprefix("rlinf_lite.").encode(), 0, 0, 0)
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = [*command]
    sys.argv = [*command[module:]]
    runpy.run_module(command[module], run_name="__main__", alter_sys=True)


def _spawn(
    path: str, command: list[str], environment: dict[str, str], *, setsigdef: list[int], setsigmask: list[int]
) -> int:
    """`os.posix_spawn` of a Python that has imported everything."""
    if pid := os.fork():
        return pid
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number in setsigdef or signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, setsigmask)
    for file in map(int, os.listdir("/proc/self/fd")):
        try:
            if not os.get_inheritable(file):
                os.close(file)
        except OSError:
            continue  # that of the directory, which is closed by now
    _run_and_end(command, environment)


def _run_and_end(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Never returns, so that no object of the parent's stack is let go: it may own a file whose number is reused."""
    code: object = 0
    try:
        _become(command, environment)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "forked":
    gc.freeze()  # what is preloaded stays
    atexit._clear()  # it is not this process that cleans up after them
    for stream in (1, 2):
        os.dup2(OUTPUT.fileno(), stream)  # noqa: F821
    OUTPUT.close()  # noqa: F821
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True, write_through=True)
    os.posix_spawn = _spawn
    _run_and_end(COMMAND, ENVIRONMENT)  # noqa: F821
