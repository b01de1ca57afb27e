"""Gloo ranks in separate processes, which are started with a time limit and stopped by process id.

Run as a script (by `runpy`, in a new process), this file is one rank.
"""

import gc
import os
import pickle
import runpy
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

TIMEOUT_SECONDS = 60


class RankError(AssertionError):
    """A rank raised something, died, or did not answer in time."""


class RunningRanks:
    """The processes of one process group. `results` waits for all of them."""

    def __init__(self, context, program, world_size, arguments, environment):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes, self.processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe(duplex=False)
            task = {
                "file": program.__code__.co_filename,
                "name": program.__name__,
                "port": self.store.port,
                "rank": rank,
                "world_size": world_size,
                "arguments": arguments,
                "environment": environment,
                "pipe": theirs,
            }
            process = context.Process(target=runpy.run_path, args=(__file__, {"TASK": task}, "rank"))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def results(self, timeout=TIMEOUT_SECONDS):
        """What each rank returned, in rank order.

        Raises:
            RankError: with the traceback of every rank that failed; the processes are then gone.
        """
        deadline = time.monotonic() + timeout
        try:
            answers = [self._answer(rank, deadline) for rank in range(len(self._pipes))]
        finally:
            self.stop()
        if failed := [text for _, text in answers if text]:
            raise RankError("\n".join(failed))
        return [result for result, _ in answers]

    def result_of(self, rank, timeout=TIMEOUT_SECONDS):
        """What one rank returned, whatever became of the others; call `stop` (or let the fixture) for those."""
        result, text = self._answer(rank, time.monotonic() + timeout)
        assert text is None, text
        return result

    def _answer(self, rank, deadline):
        pipe = self._pipes[rank]
        try:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                return None, f"rank {rank} did not answer in time"
            result, text = pickle.loads(pipe.recv_bytes())
            return result, text
        except EOFError:
            self.processes[rank].join()
            return None, f"rank {rank} ended with exit code {self.processes[rank].exitcode}"

    def stop(self):
        """Kill what is still running, each process by its id."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


@pytest.fixture
def start_ranks(fork_server):
    """``start_ranks(program, world_size, **arguments)``: a function of a test file, run on each rank as
    ``program(rank, world_size, **arguments)`` in a process group. ``environment`` is set before anything runs."""
    started = []

    def start(program, world_size, *, environment=None, **arguments):
        started.append(RunningRanks(fork_server, program, world_size, arguments, environment or {}))
        return started[-1]

    yield start
    for ranks in started:
        ranks.stop()


@pytest.fixture
def run_ranks(start_ranks):
    """As `start_ranks`, and wait; returns what each rank returned."""

    def run(program, world_size, *, timeout=TIMEOUT_SECONDS, **arguments):
        return start_ranks(program, world_size, **arguments).results(timeout)

    return run


def be_a_rank(task):
    os.environ.update(task["environment"])
    rank, size = task["rank"], task["world_size"]
    try:
        store = dist.TCPStore("127.0.0.1", task["port"], is_master=False)
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        program = runpy.run_path(str(Path(task["file"])), run_name="program")[task["name"]]
        answer = program(rank, size, **task["arguments"]), None
    except Exception:
        answer = None, f"rank {rank}: {traceback.format_exc()}"
    task["pipe"].send_bytes(pickle.dumps(answer))


if __name__ == "rank":
    gc.freeze()  # what is preloaded stays
    be_a_rank(TASK)  # noqa: F821
