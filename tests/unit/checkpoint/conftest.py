"""States to save, checkpoints to damage, and processes of their own for what kills them."""

import dataclasses
import json
import multiprocessing
import runpy
import textwrap

import pytest
import torch

from rlinf_lite import faults
from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint import manifest as manifests

SCRIPT_SECONDS = 60


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def make_state():
    """A nested state of all the forms that occur, with values that follow from the seed."""

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "model": {
                "layer.weight": torch.randn(16, 8, generator=generator),
                "layer.half": torch.randn(5, 3, generator=generator).bfloat16(),
                "mask": torch.randint(0, 2, (7,), generator=generator).bool(),
                "empty": torch.empty(0, 4),
            },
            "optim": {
                "layer.weight": {
                    "step": torch.tensor(float(seed)),
                    "exp_avg": torch.randn(16, 8, generator=generator),
                },
                "counts": torch.randint(0, 2**40, (3,), generator=generator),
            },
        }

    return make


@pytest.fixture
def save(root, make_state):
    """Save `make_state(step)` as a checkpoint of that step; returns its path."""

    def save_step(step, **info):
        checkpointer = Checkpointer(root, seed=7)
        return checkpointer.save(step, make_state(step), data={"progress": {"step": step}}, info=info).path

    return save_step


@pytest.fixture
def rewrite_manifest():
    """Change fields of a manifest so that it still agrees with its own digest, as someone with ill intent could."""

    def rewrite(path, **changes):
        changed = dataclasses.replace(manifests.read(path), **changes)
        (path / "manifest.json").write_text(changed.to_json())

    return rewrite


@pytest.fixture
def set_faults(monkeypatch):
    """Let faults strike in this process."""

    def put(*table):
        monkeypatch.setenv(faults.VARIABLE, json.dumps(table))
        faults._table.cache_clear()

    yield put
    monkeypatch.undo()
    faults._table.cache_clear()


@pytest.fixture(scope="session")
def fork_server():
    """Processes forked from one that has imported torch and done nothing else: new, and there at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlinf_lite.checkpoint"])
    return context


@pytest.fixture
def run_script(fork_server, tmp_path):
    """Run a script in a process of its own, with ``given`` as its globals; returns the exit code (-9: killed)."""

    def run(source, **given):
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(source))
        process = fork_server.Process(target=runpy.run_path, args=(str(script), given))
        process.start()
        process.join(SCRIPT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"the script was still running after {SCRIPT_SECONDS} s")
        return process.exitcode

    return run
