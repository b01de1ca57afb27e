"""Python stacks of worker processes, also of stopped and blocked ones, and how to end such processes by pid."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil

_POLL_SECONDS = 0.05
_QUIET_SECONDS = 0.25
"""A dump has no end mark: it is complete when its file has not grown for this long."""
_OUTSIDE_SECONDS = 10.0
"""Time limit for py-spy, which reads every library of the process, on a machine that may be busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process of this machine, distinguished from a later one with the same pid."""

    pid: int
    created: float
    """When it started; compared for equality only. On Linux clock ticks since boot: no change of the clock moves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The stacks of one process."""

    pid: int
    state: str
    """As psutil names it (``running``, ``sleeping``, ``stopped``, ``disk-sleep`` ...), before the process was woken;
    ``gone``; or ``unknown`` where its node does not answer."""
    text: str
    """The stacks of all threads, most recent call first; or one line that says why there are none."""


def enable() -> None:
    """Let SIGUSR1 and SIGUSR2 write this process's stacks for `collect`, instead of ending it.

    Schedulers send SIGUSR1 to every process of a job. The stacks go to a file in memory, seen as
    ``/proc/<pid>/fd/<n>`` by this user's processes and nowhere else: it ends with the process, whatever ends that (Ray
    runs no exit handlers). Where there are no such files, they go to stderr.
    """
    if sys.platform == "linux":
        if _find_file(os.getpid()) is not None:
            return
        file = os.memfd_create(_file_name(os.getpid()))
    else:
        file = sys.stderr.fileno()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        faulthandler.register(number, file=file, all_threads=True)


def me() -> Process:
    """Return the process that calls this."""
    return Process(pid=os.getpid(), created=_created(os.getpid()))


def collect(processes: Sequence[Process], seconds: float = 3.0, wake: bool = True) -> list[Stack]:
    """Read the stacks of processes of this machine; returned in the order of ``processes``.

    A process that does not answer in time (stuck in the kernel, `enable` never called) is read with ``py-spy``, if that
    is installed and may; that takes up to 10 s more.

    Args:
        seconds: how long to wait for their own answers, which take about 0.3 s.
        wake: continue stopped processes that called `enable`: they write their stacks first. Otherwise stopped ones are
            only read from outside.
    """
    states = [_state(process) for process in processes]
    asked = {
        process: file
        for process, state in zip(processes, states, strict=True)
        if state != "gone" and (wake or state != "stopped") and (file := _ask(process)) is not None
    }
    for process, state in zip(processes, states, strict=True):
        if state == "stopped" and process in asked:
            _send(process, signal.SIGCONT)
    texts = _read_all(asked, seconds)

    def stack(process: Process, state: str) -> Stack:
        if text := texts.get(process):
            return Stack(pid=process.pid, state=state, text=text)
        if _state(process) == "gone":
            return Stack(pid=process.pid, state="gone", text=f"process {process.pid} is gone")
        return Stack(pid=process.pid, state=state, text=_from_outside(process, process in asked, seconds))

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(stack, processes, states))


def end(processes: Sequence[Process]) -> None:
    """Kill processes. Does nothing to one that is gone, even if another process has its pid now."""
    for process in processes:
        _send(process, signal.SIGKILL)


def collect_on(
    nodes: Mapping[str, Sequence[Process]], seconds: float = 30.0, wake: bool = True
) -> dict[str, list[Stack]]:
    """`collect` on several Ray nodes at once.

    Args:
        nodes: Ray node id -> processes of that node.
        seconds: for other nodes than this one; an answer takes some seconds, as a process is started there.
    """
    answers = _on_nodes(collect, nodes, seconds, wake=wake)
    return {
        node: [Stack(pid=process.pid, state="unknown", text=answer) for process in nodes[node]]
        if isinstance(answer, str)
        else answer
        for node, answer in answers.items()
    }


def end_on(nodes: Mapping[str, Sequence[Process]], seconds: float = 30.0) -> dict[str, str]:
    """`end` on several Ray nodes at once; returns the nodes where that did not work, with the reason."""
    answers = _on_nodes(end, nodes, seconds)
    return {node: answer for node, answer in answers.items() if isinstance(answer, str)}


# -- one process


def _created(pid: int) -> float:
    if sys.platform == "linux":  # psutil adds the time of boot, which moves when the clock is set
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()


def _state(process: Process) -> str:
    try:
        state = str(psutil.Process(process.pid).status())
        same = _created(process.pid) == process.created
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return "gone"
    return state if same and state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "gone"


def _send(process: Process, number: signal.Signals) -> None:
    if _state(process) == "gone":
        return
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return


def _file_name(pid: int) -> str:
    return f"rlinf_lite-stacks-{pid}"  # a forked child has its parent's file open too


def _find_file(pid: int) -> Path | None:
    """Where the stacks of a process go; None if it never called `enable`, or is another user's."""
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(file).startswith(f"/memfd:{_file_name(pid)} "):
                    return file
            except FileNotFoundError:
                continue  # closed since
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return None


def _ask(process: Process) -> BinaryIO | None:
    """Send the signal; returns the open file, at the end of what earlier signals wrote. None: it would end by it."""
    path = _find_file(process.pid)
    try:
        file = path.open("rb") if path is not None else None
    except OSError:
        return None
    if file is not None:
        file.seek(0, os.SEEK_END)
        _send(process, signal.SIGUSR1)
    return file


def _read_all(files: Mapping[Process, BinaryIO], seconds: float) -> dict[Process, str]:
    """What comes into the files until each has something and grows no more, in ``seconds``. Closes them."""
    texts = {process: b"" for process in files}
    grew = {process: time.monotonic() for process in files}
    deadline = time.monotonic() + seconds
    waiting = list(files)
    while waiting and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        for process in waiting:
            if more := files[process].read():
                texts[process] += more
                grew[process] = time.monotonic()
        now = time.monotonic()
        waiting = [process for process in waiting if not texts[process] or now - grew[process] < _QUIET_SECONDS]
    for file in files.values():
        file.close()
    return {process: text.decode(errors="replace") for process, text in texts.items()}


def _from_outside(process: Process, asked: bool, seconds: float) -> str:
    """Stacks of a process that does not write them itself; or why there are none."""
    command = shutil.which(
        "py-spy", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    )
    if command is None:
        reason = "py-spy is not installed"
    else:
        try:  # nonblocking: it must not wait until a process that is stuck in the kernel stops for it
            spied = subprocess.run(
                [command, "dump", "--nonblocking", "--pid", str(process.pid)],
                capture_output=True,
                text=True,
                timeout=_OUTSIDE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            reason = f"py-spy took more than {_OUTSIDE_SECONDS:g} s"
        else:
            if spied.returncode == 0 and spied.stdout:
                return spied.stdout
            reason = f"py-spy failed: {' '.join(spied.stderr.split())[:300]}"
    first = f"did not write them in {seconds:g} s" if asked else "does not write them"
    where = f"it is {_state(process)}, in the kernel at {_kernel_function(process.pid)}"
    return f"no stacks: process {process.pid} {first}; {reason}; {where}"


def _kernel_function(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return "an unknown place"
    return name if name not in ("", "0") else "no waiting place"


# -- other nodes


def _on_nodes(
    work: Callable[..., Any], nodes: Mapping[str, Sequence[Process]], seconds: float, **options: Any
) -> dict[str, Any]:
    """What ``work(processes, **options)`` gives on each node; a string that says why, where it gave nothing."""
    import ray  # here, so that what concerns one machine needs no Ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from rlinf_lite.cluster.guard import guard

    here = ray.get_runtime_context().get_node_id()
    task = ray.remote(work)
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes if node != here}
    refs = {
        node: guard.ask(
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote, list(nodes[node]), **options
        )
        for node, strategy in there.items()
    }
    deadline = time.monotonic() + seconds
    answers: dict[str, Any] = {}
    if here in nodes:
        try:
            answers[here] = work(nodes[here], **options)
        except PermissionError as error:
            answers[here] = f"node {here}: {error!r}; run the driver as the user who started Ray"
    for node, ref in refs.items():
        try:
            answers[node] = guard.get(ref, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            answers[node] = f"node {node} does not answer: nothing in {seconds:g} s"
        except ray.exceptions.RayTaskError as error:
            answers[node] = f"node {node}: {error.cause!r}"
        except ray.exceptions.RayError as error:
            answers[node] = f"node {node} does not answer: {' '.join(str(error).split())[:300]}"
    return {node: answers[node] for node in nodes}
