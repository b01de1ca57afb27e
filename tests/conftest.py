"""Whole runs in real processes: started as a user starts them, killed as a cluster kills them, compared as bits."""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO

import psutil
import pytest

from rlinf_lite import numerics
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE, ForkServer
from rlinf_lite.quick_imports import quick_imports

os.environ.update(numerics.environment())  # as in every worker; read when torch is imported, by test files

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Test files import torch, transformers and more. From then on the garbage collector runs less often: tests leave
    little for it, and it walks over a lot."""
    with quick_imports():
        collected = yield
    gc.set_threshold(50_000)
    return collected


def _directory(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


@pytest.hookimpl(trylast=True)  # without what is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs among the other tests, since they leave cores idle; none at the end, where nothing fills them."""
    runs = [item for item in items if _directory(item) == "e2e"]
    others = sorted(
        (item for item in items if _directory(item) != "e2e"),
        key=lambda item: _directory(item) == "unit",  # what has processes of its own comes first
    )
    between = int(0.8 * len(others) / max(1, len(runs)))
    items.clear()
    for place, run in enumerate(runs):
        items += [run, *others[place * between : (place + 1) * between]]
    items += others[len(runs) * between :]


_PLACES = Path(__file__), Path(__file__).with_name("run.sh")
"""Files that are always there, to be locked."""


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the time limit of a test does not count waiting
def pytest_runtest_protocol(item: pytest.Item):
    """At most two whole runs at a time, whatever the number of workers of pytest-xdist."""
    if _directory(item) != "e2e" or "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open()) for path in _PLACES]
        while not any(map(_lock, files)):
            time.sleep(0.1)
        return (yield)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# 24 problems, 8 per step: an epoch is 3 steps. No spare worker process: only tests of recovery have a use for one.
TINY = {
    "runner.max_steps": "8",
    "runner.save_interval": "1",
    "runner.val_check_interval": "4",
    "runner.logger.log_rollouts": "-1",
    "data.arithmetic.num_problems": "24",
    "data.arithmetic.num_val_problems": "8",
    "data.rollout_batch_size": "8",
    "algorithm.group_size": "4",
    "algorithm.training_batch_size_per_gpu": "8",
    "rollout.max_running_requests": "16",
    "cluster.warm_spares": "0",
}
_END_SECONDS = 600
"""After which a run counts as hanging. On a quiet machine it ends within 30 s."""
ForkedProcess = runpy.run_path(str(Path(__file__).with_name("forked_run.py")))["ForkedProcess"]
Process = subprocess.Popen[str] | ForkedProcess
_SECONDS = ("time/", "throughput/", "memory/", "save/")


@functools.cache
def template_server() -> ForkServer:
    """A fork server for all runs of this test process; it ends with it."""
    from rlinf_lite.cluster.forks.environment import worker_env

    return ForkServer(worker_env(1, "cpu"))


@dataclass
class Run:
    """One run's directory, over as many processes as it takes."""

    root: Path
    overrides: dict[str, str]
    processes: list[Process] = field(default_factory=list, compare=False)
    template: bool = True
    """Fork workers from a server of this test process. False: as for a user, whose driver starts its own."""
    context: BaseContext | None = None
    """Of the fork server from which parent and driver are forked. None: started as by a user, by running Python."""

    @property
    def directory(self) -> Path:
        return self.root / "grpo-tiny-arithmetic"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def arguments(self, *extra: str) -> list[str]:
        settings = {**TINY, **self.overrides, "runner.output_dir": str(self.root)}
        return [*(f"{key}={value}" for key, value in settings.items()), *extra]

    def start(self, *extra: str, faults: list[dict] | None = None) -> Process:
        command = [sys.executable, "-u", "-m", "rlinf_lite.main_math", *self.arguments(*extra)]
        env = {**os.environ, "RAY_ADDRESS": os.environ.get("RLINF_LITE_TEST_RAY", "local")}
        if self.template:
            env[TEMPLATE_VARIABLE] = template_server().name
        if faults:
            env["RLINF_LITE_FAULTS"] = json.dumps(faults)
        process: Process
        if self.context is None:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        else:
            process = ForkedProcess(self.context, command, env)
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Leave no run behind, whatever a test died of: the driver and its workers end with the parent."""
        for process in self.processes:
            process.kill()
            process.wait(timeout=60)

    def finish(self, *extra: str, faults: list[dict] | None = None, expect: int = 0) -> str:
        """Run to the end; returns what was printed."""
        process = self.start(*extra, faults=faults)
        printed, _ = process.communicate(timeout=_END_SECONDS)
        assert process.returncode == expect, f"exit code {process.returncode}\n{printed}"
        return printed

    def read_until(self, process: Process, text: str) -> str:
        """What the process prints up to the line with ``text``."""
        printed = ""
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if text in line:
                return printed
        raise AssertionError(f"{text!r} never came:\n{printed}")

    def kill_when(self, text: str, *extra: str, faults: list[dict] | None = None) -> str:
        """kill -9 parent and driver as soon as ``text`` is printed; returns what was printed until then."""
        process = self.start(*extra, faults=faults)
        printed = self.read_until(process, text)
        driver = self.driver(process)
        process.kill()
        driver.kill()
        process.wait(timeout=60)
        return printed

    def driver(self, process: Process) -> psutil.Process:
        """The driver that ``process``, the parent, runs now."""
        while True:
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if child.name() == "driver" or "rlinf_lite.driver" in child.cmdline():
                        return child
            time.sleep(0.01)

    def below(self, process: Process) -> list[psutil.Process]:
        """All processes of the run below ``process``, the parent, and workers that a template has forked for it."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid).children(recursive=True)
        names = {f"forks-{child.pid}" for child in found} if self.template else set()
        for server in psutil.Process(template_server().pid).children() if names else []:
            with suppress(psutil.NoSuchProcess):
                if server.name() in names:
                    found += [server, *server.children()]
        return found

    def steps(self) -> list[int]:
        """Of the committed checkpoints."""
        from rlinf_lite.checkpoint import layout

        return sorted(layout.step_of(path) or 0 for path in layout.committed(self.checkpoints))

    def rows(self) -> list[dict]:
        """Metric rows without seconds, speeds, memory and which save had ended by then."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(_SECONDS)} for line in lines]

    def samples(self) -> list[dict]:
        """Prompts and generated token ids of every step."""
        return [json.loads(line) for line in (self.directory / "rollouts.jsonl").read_text().splitlines()]

    def digest(self, step: int) -> str:
        """sha256 of the parameters, optimizer state and counters in a checkpoint, without the RNG state."""
        return self._digest(step, lambda name: not name.startswith("rng."), holds="exp_avg_sq")

    def rng_digest(self, step: int) -> str:
        return self._digest(step, lambda name: name.startswith("rng."), holds="")

    def _digest(self, step: int, wanted: Callable[[str], bool], *, holds: str) -> str:
        """Of all sections: ``actor/model...``; one of the names must end with ``holds``."""
        from rlinf_lite.checkpoint.digest import state_digest
        from rlinf_lite.checkpoint.formats.read_state import read_tensors

        sections = sorted(path.parent for path in (self.checkpoints / f"global_step_{step}").glob("*/.metadata"))
        read = {section.name: read_tensors(section, wanted) for section in sections}
        tensors = {f"{section}/{name}": tensor for section, held in read.items() for name, tensor in held.items()}
        assert any(name.endswith(holds) for name in tensors)
        return state_digest(tensors)

    def data_digest(self, step: int) -> str:
        return hashlib.sha256((self.checkpoints / f"global_step_{step}" / "data" / "data.pt").read_bytes()).hexdigest()


def _assert_same_run(one: Run, other: Run, last_step: int, *, same_ranks: bool = True) -> None:
    assert one.digest(last_step) == other.digest(last_step)
    if same_ranks:
        assert one.rng_digest(last_step) == other.rng_digest(last_step)
    assert one.data_digest(last_step) == other.data_digest(last_step)
    assert [row["step"] for row in one.rows()] == list(range(1, last_step + 1))
    assert one.rows() == other.rows()
    assert one.samples() == other.samples()


@pytest.fixture(scope="session")
def same_run():
    """Assert that two runs are bit-equal: parameters, optimizer and RNG state, counters, metrics and tokens.

    With ``same_ranks=False`` without the RNG state, which each rank saves and no number comes from.
    """
    return _assert_same_run


_PRELOAD = [
    "pytest",
    "torch._dynamo",  # by the first DTensor
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "rlinf_lite.checkpoint.checkpointer",
    "rlinf_lite.checkpoint.digest",
    "rlinf_lite.selfcheck.update",
    "rlinf_lite.training.fsdp.build",
    "wandb",
    "rlinf_lite.config.compose",
    "rlinf_lite.config.unusual",
    "rlinf_lite.launch",
    "rlinf_lite.parent",
    "rlinf_lite.recovery.build",
    "rlinf_lite.recovery.prepare",
    "rlinf_lite.recovery.supervisor",
]
"""What ranks, programs and drivers import. Python leaves out in silence what is not installed."""


@pytest.fixture(scope="session")
def fork_server():
    """Starts new processes quickly: forked from one that has imported libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@pytest.fixture
def run_forked(fork_server, tmp_path: Path):
    """``run_forked("tool.py", "--flag")`` or ``run_forked("-c", code)``: as `subprocess.run` of Python, forked."""
    program = str(Path(__file__).with_name("forked_program.py"))

    def run(*arguments, cwd=".", env=None, timeout=120) -> subprocess.CompletedProcess[str]:
        code = arguments[1] if arguments[0] == "-c" else None
        given = [str(argument) for argument in arguments if argument is not code]
        stdout, stderr = tmp_path / "forked.stdout", tmp_path / "forked.stderr"
        task = {
            "ARGUMENTS": given,
            "CODE": code,
            "DIRECTORY": str(cwd),
            "ENVIRONMENT": dict(os.environ if env is None else env),
            "STDOUT": str(stdout),
            "STDERR": str(stderr),
        }
        process = fork_server.Process(target=runpy.run_path, args=(program, task, "forked"))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(given, timeout, stdout.read_text(), stderr.read_text())
        return subprocess.CompletedProcess(given, process.exitcode, stdout.read_text(), stderr.read_text())

    return run


@pytest.fixture(scope="session")
def forks() -> ForkServer:
    """A fork server that has imported, or is importing, what workers import."""
    return template_server()


@pytest.fixture
def start_forked(fork_server: BaseContext):
    """``start_forked(command, environment)``: a run, as `subprocess.Popen` with a pipe for all that it prints."""
    return functools.partial(ForkedProcess, fork_server)


@pytest.fixture
def new_run(tmp_path: Path, fork_server: BaseContext):
    """Makes runs in directories of their own; ``plain``: started by running Python, as by a user."""
    made: list[Run] = []

    def make(overrides: dict[str, str], *, plain: bool = False) -> Run:
        joins = "RLINF_LITE_TEST_RAY" in os.environ  # Ray reads the settings of a cluster when it is imported
        made.append(Run(tmp_path / f"run{len(made)}", overrides, context=None if plain or joins else fork_server))
        return made[-1]

    yield make
    for run in made:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, fork_server: BaseContext):
    """``undisturbed(name, overrides)``: a run that nothing happened to. Tests only read it.

    It is made once per session, by whichever worker of pytest-xdist needs it first; the others wait for it.
    """
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # the same one for all workers

    def make(name: str, overrides: dict[str, str]) -> Run:
        run, finished = Run(directory / name, overrides, context=fork_server), directory / f"{name}.finished"
        with (directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(run.root, ignore_errors=True)  # of a worker that failed
                try:
                    run.finish()
                finally:
                    run.end()
                finished.touch()
        return Run(run.root, overrides)

    return make


@pytest.fixture(scope="session")
def straight(undisturbed) -> Run:
    """2 actor ranks, 1 rollout worker, 8 steps, never killed."""
    return undisturbed("straight", {})


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The embedded model's directory with one layer less."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlinf_lite.models import hf_directory

    embedded = hf_directory.resolve("embedded:tiny-arithmetic")
    other = tmp_path / "other"
    shutil.copytree(embedded, other)
    config = AutoConfig.from_pretrained(embedded)
    config.hidden_size, config.head_dim = 32, 8
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    return other
