"""An engine in this process, and engines in separate processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))


class Engines:
    """One at a time: engines in one process share vLLM's process groups, and closing one closes all."""

    def __init__(self) -> None:
        self._key, self._engine = "", None

    def of(self, *args: Any, **settings: Any):
        """As `make_engine`; the one that is there if it is the same. A test loads what weights it needs."""
        from engine_process import make_engine

        if (key := repr((args, sorted(settings.items())))) != self._key:
            self.close()
            self._key, self._engine = key, make_engine(*args, **settings)
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._key, self._engine = "", None


@pytest.fixture(scope="session")
def engines():
    made = Engines()
    yield made
    made.close()


@pytest.fixture
def engine(engines):
    """Over the embedded model with two heads, in fp32."""
    return engines.of()


class Processes:
    """Engines in new processes, ended with the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.running: list[subprocess.Popen[str]] = []

    def start(self, **job: Any) -> tuple[subprocess.Popen[str], Path]:
        """The process, and the file that will hold the results of its batches."""
        output = self._directory / f"{len(self.running)}.json"
        command = [sys.executable, str(HERE / "engine_process.py")]
        with (self._directory / "log").open("a") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
        self.running.append(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps({**job, "output": str(output)}))
        process.stdin.close()
        return process, output

    def run(self, **job: Any) -> list[Any]:
        process, output = self.start(**job)
        assert process.wait(timeout=280) == 0, self.log
        return json.loads(output.read_text())

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text()


@pytest.fixture
def processes(tmp_path: Path):
    made = Processes(tmp_path)
    yield made
    for process in made.running:
        process.kill()
        process.wait()
