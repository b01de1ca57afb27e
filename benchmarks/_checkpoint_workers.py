"""Worker processes of the checkpoint benchmark: each holds one object and runs the driver's calls on it."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_SECONDS = 600
STOP_SECONDS = 5.0


class WorkerError(RuntimeError):
    """A worker raised something, died, or did not answer in time; holds its traceback."""


class Team:
    """Processes that run each call together. Leaving the ``with`` block ends them."""

    def __init__(self, name: str, builds: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        """Start one process for each ``(class, arguments)`` of ``builds``; the first `ask` waits for them."""
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipes: list[Connection] = []
        self._processes = []
        for build, arguments in builds:
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, build, arguments))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle one then ends by itself
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def ask(self, act: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Have every process do ``act(its object, *arguments)`` at the same time; what each returned, in order.

        Raises:
            WorkerError: the first that failed; the others may then wait for it, and are ended with the team.
        """
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # it failed already, and left word
                pipe.send((act, arguments))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(answers) < len(self._pipes):
            missing = [pipe for index, pipe in enumerate(self._pipes) if index not in answers]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerError(f"{self._name}: no answer within {TIMEOUT_SECONDS} s")
            for index, pipe in enumerate(self._pipes):
                if pipe in ready:
                    answers[index] = self._answer(index, pipe)
        return [answers[index] for index in range(len(self._pipes))]

    def _answer(self, index: int, pipe: Connection) -> Any:
        try:
            result, error = pipe.recv()
        except EOFError:
            self._processes[index].join()
            raise WorkerError(f"{self._name} {index} ended: exit code {self._processes[index].exitcode}") from None
        if error:
            raise WorkerError(f"{self._name} {index}:\n{error}")
        return result


def _serve(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        held = build(*arguments)
        while True:
            act, arguments = pipe.recv()
            pipe.send((act(held, *arguments), None))
    except EOFError:  # the driver is gone
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))
