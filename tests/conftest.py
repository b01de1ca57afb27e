"""The order of tests, and what many of them share: whole runs, and new processes that start quickly."""

from __future__ import annotations

import fcntl
import functools
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO

import pytest

from rlinf_lite import numerics
from rlinf_lite.cluster.forks.client import ForkServer, can_fork
from rlinf_lite.cluster.forks.environment import worker_env
from rlinf_lite.quick_imports import quick_imports

os.environ.update(numerics.environment())  # as in every worker; read when torch is imported, by test files
numerics.make_mkl_strict()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

_WHOLE_RUN = runpy.run_path(str(Path(__file__).with_name("whole_run.py")))
Run, ForkedProcess, template_server = (_WHOLE_RUN[name] for name in ("Run", "ForkedProcess", "template_server"))


def pytest_configure(config: pytest.Config) -> None:
    """Where workers of pytest-xdist run the tests, one fork server is started for all of them."""
    is_worker, tests_run = hasattr(config, "workerinput"), not config.option.collectonly
    if getattr(config.option, "numprocesses", None) and tests_run and not is_worker and can_fork("cpu"):
        server = ForkServer(worker_env(1, "cpu"))
        os.environ[_WHOLE_RUN["SHARED_TEMPLATE"]] = server.name
        config.add_cleanup(server.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Schedule(LoadGroupScheduling):
        """Drops finished tests, all of which pytest-xdist would count again after each test."""

        def mark_test_complete(self, node, item_index, duration=0):
            super().mark_test_complete(node, item_index, duration)
            work = self.assigned_work[node]
            for name in [name for name, unit in work.items() if all(unit.values())]:
                del work[name]

    return Schedule(config, log)


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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As workers compute; with two threads the products split their rows between them, and round differently."""
    import torch  # most tests need none

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
