"""A start that is refused: one clear message, an exit code, and a disk as it was before. Whole processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import AutoConfig

from rlinf_lite.checkpoint.storage import storage_path
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE
from rlinf_lite.config import OptimConfig
from rlinf_lite.config.compose import load
from rlinf_lite.errors import ConfigError
from rlinf_lite.recovery.directories import make_directories
from rlinf_lite.recovery.prepare import _log_if_never_warm, prepare

DRIVER = "import runpy; runpy.run_module('rlinf_lite.driver', run_name='__main__')"
LONG = f"/tmp/{'x' * 60}"


@pytest.fixture
def empty(tmp_path):
    """The directory in which runs are started."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def start(empty, run_forked):
    """``start(overrides, env)``: a driver without its parent, or with ``plain`` the whole command as of a user."""

    def run(overrides: list[str], env: dict[str, str], *, plain: bool = False) -> subprocess.CompletedProcess[str]:
        given = [f"runner.output_dir={empty}/new/logs", *overrides]
        env = {**os.environ, "RAY_ADDRESS": "local", **env}
        if not plain:
            return run_forked("-c", DRIVER, *given, cwd=empty, env=env)
        command = [sys.executable, "-m", "rlinf_lite.main_math", *given]
        return subprocess.run(command, cwd=empty, env=env, text=True, capture_output=True)

    return run


@pytest.mark.parametrize(
    ("overrides", "env", "said"),
    [
        (["cluster.component_placement.value=0"], {}, "unknown component 'value'"),
        ([f"cluster.object_store_memory={2**49}"], {}, "cluster.object_store_memory=562949953421312: /dev/shm has"),
        (["runner.logger.log_path=/dev/null/x"], {}, "runner.logger.log_path: cannot write in /dev/null/x"),
        ([], {"RAY_TMPDIR": LONG}, f"RAY_TMPDIR={LONG}: is "),
        ([], {"TMPDIR": LONG}, f"TMPDIR={LONG}: is "),
        ([], {"RAY_TMPDIR": "/dev/null/x"}, "RAY_TMPDIR=/dev/null/x: Ray cannot make its temporary directory"),
    ],
    ids=["placement", "object store", "log path", "RAY_TMPDIR", "TMPDIR", "no directory"],
)
def test_it_is_explained_and_leaves_nothing(empty, start, overrides, env, said, request):
    done = start(overrides, env, plain="no directory" in request.node.name)
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) <= 3
    assert list(empty.iterdir()) == []


def test_what_was_there_before_stays(empty, start, forks):
    (empty / "new" / "logs" / "grpo-tiny-arithmetic").mkdir(parents=True)
    before = sorted(empty.rglob("*"))
    done = start(["cluster.component_placement.critic=0"], {TEMPLATE_VARIABLE: forks.name})
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr
    assert "critic is placed, but there is none" in done.stderr and len(done.stderr.splitlines()) <= 3
    assert sorted(empty.rglob("*")) == before


def test_a_value_without_effect_is_noted(start, forks):
    given = ["actor.calculate_flops=true", "cluster.component_placement.critic=0"]
    done = start(given, {TEMPLATE_VARIABLE: forks.name})
    assert done.stdout.splitlines()[0].startswith("note: actor.calculate_flops=true has no effect: ")


def test_directories_that_cannot_all_be_made_are_not_made(tmp_path):
    config = load([f"runner.output_dir={tmp_path}/a", "runner.checkpoint.root=/dev/null/x"])
    with pytest.raises(ConfigError, match=r"runner\.checkpoint\.root: cannot write"):
        make_directories(config.runner)
    assert list(tmp_path.iterdir()) == []


def test_a_probe_is_no_way_to_another_file(tmp_path):
    """Its name cannot be known before; a link of that name would not be followed."""
    directories = make_directories(load([f"runner.output_dir={tmp_path}/a"]).runner)
    assert [path.name for path in directories.made] == ["a", "grpo-tiny-arithmetic", "checkpoints"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_critic_that_transformers_cannot_build_is_refused_before_workers_start(tmp_path):
    AutoConfig.for_model("cohere", num_hidden_layers=1).save_pretrained(tmp_path)
    critic = ["critic.use_critic_model=true", "algorithm.adv_type=gae", f"critic.model.model_path={tmp_path}"]
    said = r"critic\.model\.model_path=.*: .*no token classifier for the model type cohere.*; give a model of a type"
    with pytest.raises(ConfigError, match=said):
        prepare(load(critic), storage_path(tmp_path / "checkpoints"))


@pytest.mark.parametrize(("warmup", "said"), [(3, ""), (4, "note: actor.optim.lr_warmup_steps=4: the run has 4")])
def test_a_warm_up_longer_than_the_run_is_said(capsys, warmup, said):
    _log_if_never_warm(OptimConfig(lr_warmup_steps=warmup), 4)
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)
