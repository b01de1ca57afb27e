"""Fixtures for checkpoint tests: states to save, manifests to edit, injected faults, and scripts in new processes."""

import dataclasses
import json
import math
import os
import runpy
import shutil
import sys
import textwrap

import pytest
import torch

from rlinf_lite import faults
from rlinf_lite.checkpoint import Checkpointer, layout
from rlinf_lite.checkpoint import manifest as manifests
from rlinf_lite.checkpoint.cli.command import main

SCRIPT_SECONDS = 60
B3SUM = """\
#!{python}
import pathlib, sys
from blake3 import blake3
pairs = [line.rstrip("\\n").split("  ", 1) for line in sys.stdin]
bad = [name for digest, name in pairs if blake3(pathlib.Path(name).read_bytes()).hexdigest() != digest]
for _, name in pairs:
    print(f"{{name}}: {{'FAILED' if name in bad else 'OK'}}")
sys.exit(bool(bad) or not pairs or sys.argv[1:] != ["--check"])
"""


@pytest.fixture
def b3sum(tmp_path_factory, monkeypatch):
    """The command ``b3sum``, or where it is not installed one that checks the same lines."""
    if shutil.which("b3sum"):
        return
    directory = tmp_path_factory.mktemp("bin")
    script = directory / "b3sum"
    script.write_text(B3SUM.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def make_state():
    """Make a nested state with tensors of many types and shapes, and values that depend on the seed."""

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
    """Change fields of a manifest and update its digest, as a hostile writer could."""

    def rewrite(path, **changes):
        changed = dataclasses.replace(manifests.read(path), **changes)
        (path / "manifest.json").write_text(changed.to_json())

    return rewrite


@pytest.fixture
def set_faults(monkeypatch):
    """Inject faults into this process."""

    def put(*table):
        monkeypatch.setenv(faults.VARIABLE, json.dumps(table))
        faults._table.cache_clear()

    yield put
    monkeypatch.undo()
    faults._table.cache_clear()


@pytest.fixture
def run_script(fork_server, tmp_path):
    """Run a script in a new process with ``given`` as its globals; returns the exit code (-9 if killed)."""

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


@pytest.fixture
def path(save):
    """The path of a checkpoint of step 5."""
    return save(5)


@pytest.fixture
def plant(path, rewrite_manifest):
    """Replace a file of the checkpoint, and let the manifest agree."""

    def put(name, content):
        (path / name).write_bytes(content)
        files = manifests.read(path).files
        rewrite_manifest(path, files={**files, name: manifests.hash_file(path / name)})
        manifests.read_verified(path, "full")

    return put


@pytest.fixture
def load(root, path, make_state):
    """Load `path`; what was loaded is not returned."""
    return lambda: Checkpointer(root, seed=7).load(path, make_state(6))


@pytest.fixture
def cli(capsys):
    """Run ``cli("ls", root)``; returns the exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        if code == 2:
            assert printed.err.startswith("error: ")
            assert printed.err.count("\n") == 1
        return code, printed.out, printed.err

    return run


@pytest.fixture
def cli_json(cli):
    """As `cli`, but returns the exit code and the JSON."""

    def run(*arguments):
        code, out, _ = cli(*arguments, "--json")
        return code, json.loads(out)

    return run


@pytest.fixture
def mixed(save, root):
    """A directory with one checkpoint of every state, and leftovers."""
    save(10, metrics={"reward": 0.25, "loss": math.nan})
    layout.pin_file(save(20)).write_bytes(b"")
    (save(30) / "manifest.json").write_bytes(b"{}")
    shutil.copytree(root / "global_step_10", root / "global_step_40.tmp-ab")
    (root / "global_step_40.tmp-ab" / "manifest.json").unlink()
    layout.set_aside(save(50))
    (root / "global_step_60").mkdir()
    (root / "global_step_5.deleting-cd").mkdir()
    (root / "notes").mkdir()
    return root
