"""Numeric settings take effect: each is read back from torch, in a separate process."""

from __future__ import annotations

import json
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlinf_lite import numerics
from rlinf_lite.cluster.errors import WorkerLost
from rlinf_lite.cluster.workers.device import fix_device
from rlinf_lite.config import ClusterConfig, Config, ConfigError, flatten
from rlinf_lite.config.compose import load
from rlinf_lite.errors import EXIT_USER_ERROR
from rlinf_lite.eval.command import explain as explain_eval
from rlinf_lite.eval.engine import prepare_device
from rlinf_lite.launch import launch
from rlinf_lite.recovery import lock
from rlinf_lite.recovery.diagnosis import diagnose
from rlinf_lite.recovery.directories import make_directories
from rlinf_lite.recovery.handover import ParentLink
from rlinf_lite.recovery.identity import refuse_changes
from rlinf_lite.runner.failures import explain
from rlinf_lite.stopwatch import Stopwatch

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = tuple(numerics.environment())

STATE = """
import json, os, runpy, sys, torch
from torch.utils import deterministic as filling

def state():
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    return {
        "strict": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": filling.fill_uninitialized_memory,
        "cudnn attention": cuda.cudnn_sdp_enabled(),
        "bf16 sums": matmul.allow_bf16_reduced_precision_reduction,
        "bf16 split": matmul.allow_bf16_reduced_precision_reduction_split_k,
        "fp16 sums": matmul.allow_fp16_reduced_precision_reduction,
        "fp16 split": matmul.allow_fp16_reduced_precision_reduction_split_k,
        "tf32": [matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()],
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }
"""


def run_python(*arguments, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def in_new_process(code: str, environment: dict[str, str] | None = None, run=run_python):
    """What ``code`` prints last, as JSON. None of the variables is set, unless ``environment`` does."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = run("-c", code, env={**kept, "CUDA_VISIBLE_DEVICES": "", **(environment or {})}, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


_STATES: dict[str, dict] = {}


@pytest.fixture
def states(run_forked, tmp_path):
    """Before and after each call, one after another in one process, which is forked from one that imports torch."""
    if not _STATES:
        _STATES.update(in_new_process(made_by_calls(str(tmp_path / "saved")), run=run_forked))
    return _STATES


def made_by_calls(saved: str) -> str:
    return f"""
VARIABLES = {VARIABLES!r}
{STATE}
from rlinf_lite import numerics
found = dict(torch=state())
numerics.fix("cpu", threads=2)
found["fixed"] = state()
numerics._allow_reduced_sums(False)  # what a GPU adds, as far as a build for CPUs can do it
found["gpu"] = state()
numerics._allow_reduced_sums(True)
numerics.hand_over("cpu")
found["handed over"] = state()
numerics.fix("cpu", threads=2, deterministic=False)
found["opted out"] = state()
sys.argv = ["train_with_checkpoints.py", "--steps", "1", "--save-dir", {saved!r}]
runpy.run_path("docs/examples/train_with_checkpoints.py", run_name="__main__")
found["example"] = state()
print(json.dumps(found))
"""


def test_torch_as_it_comes(states):
    found = states["torch"]
    assert not found["strict"] and not found["warn_only"] and found["fill"] and found["cudnn attention"]
    assert found["tf32"] == [False, True, "highest"]


def test_strict_and_not_only_warned(states):
    assert (states["torch"]["strict"], states["fixed"]["strict"], states["fixed"]["warn_only"]) == (False, True, False)
    assert states["fixed"]["fill"] is False
    assert states["fixed"]["cudnn attention"] is False
    assert states["fixed"]["tf32"] == [False, False, "highest"]
    assert states["fixed"]["threads"] == 2


def test_products_are_neither_split_nor_summed_in_sixteen_bits(states):
    names = ("bf16 sums", "bf16 split", "fp16 sums", "fp16 split")
    assert [states["torch"][name] for name in names] == [True] * 4
    assert [states["gpu"][name] for name in names] == [False] * 4


def test_opting_out_leaves_the_kernels_to_torch(states):
    opted_out, default = states["opted out"], states["torch"]
    chosen = ("strict", "warn_only", "fill", "bf16 sums", "bf16 split", "fp16 sums", "fp16 split")
    assert {name: opted_out[name] for name in chosen} == {name: default[name] for name in chosen}
    assert opted_out["cudnn attention"] is False and opted_out["tf32"] == [False, False, "highest"]


def test_an_engine_with_kernels_of_its_own_finds_torch_as_it_comes(states):
    kept = ("threads", "environment")
    found, default = states["handed over"], states["torch"]
    assert {name: found[name] for name in found if name not in kept} == {
        name: default[name] for name in default if name not in kept
    }


def test_the_environment_of_a_program_of_its_own(states):
    """A user of the builtin engine or of `CheckpointManager` calls `fix`, and need not know the variables."""
    assert states["torch"]["environment"] == dict.fromkeys(VARIABLES)
    assert states["fixed"]["environment"][numerics.WORKSPACE] == ":4096:8"
    assert states["fixed"]["environment"]["OMP_NUM_THREADS"] == "2"


def test_the_example_fixes_its_kernels(states):
    found = states["example"]
    assert found["strict"] and not found["warn_only"] and found["threads"] == 1


@pytest.mark.parametrize(("module", "argument"), [("rlinf_lite.eval", "--help"), ("rlinf_lite.driver", "")])
def test_the_environment_of_eval_and_driver(module, argument):
    """It is there before torch is imported, whatever the shell had."""
    code = f"""
import json, os, runpy, sys
sys.argv = ["", {argument!r}]
try:
    runpy.run_module({module!r}, run_name="__main__" if {argument!r} else "imported", alter_sys=True)
except SystemExit:
    pass
print()
print(json.dumps(["torch" in sys.modules, {{name: os.environ.get(name) for name in {VARIABLES!r}}}]))
"""
    found = in_new_process(code, {"OMP_NUM_THREADS": "7", numerics.WORKSPACE: ":0:0"})
    assert found == [False, numerics.environment()]


def test_the_tests_compute_as_a_worker_does():
    assert {name: os.environ.get(name) for name in VARIABLES} == numerics.environment()
    assert torch.get_num_threads() == 1


def test_memory_is_asked_for_in_huge_pages():
    """The allocator of a process that is started with the variables obeys them: its large blocks have the flag."""
    code = """
import ctypes, json
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
block = malloc(1 << 24)
flags, inside = "", False
for line in open("/proc/self/smaps"):
    first, _, last = line.split()[0].partition("-")
    if last:
        inside = int(first, 16) <= block < int(last, 16)
    elif inside and line.startswith("VmFlags"):
        flags = line
print(json.dumps("hg" in flags.split()))
"""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("Linux gives huge pages to every process here, or to none")
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("this allocator cannot be asked for huge pages")
    assert in_new_process(code, numerics.environment()) and not in_new_process(code)


def test_a_users_own_allocator_stays(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert numerics.environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_no_other_file_sets_the_variables():
    """`numerics.environment` is the only list; documents and this test may name them."""
    files = [file for part in ("rlinf_lite", "tests", "benchmarks", "toolkits") for file in (ROOT / part).rglob("*")]
    named = {
        file.relative_to(ROOT).as_posix()
        for file in [*files, ROOT / "run_main_math.sh"]
        if file.suffix in (".py", ".sh") and any(name in file.read_text() for name in VARIABLES)
    }
    assert named == {"rlinf_lite/numerics.py", "tests/unit/test_numerics.py"}


@pytest.fixture
def torch_restored(monkeypatch):
    """What `fix` changes in this process is undone."""
    threads = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv(numerics.WORKSPACE)
    monkeypatch.setattr(numerics, "_is_fixed", False)
    monkeypatch.setattr(numerics, "_mkl_mode_is_ours", False)  # so that it stays: MKL is in it for good
    yield
    numerics.hand_over("cpu")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("deterministic", [True, False])
def test_eval_and_workers_fix_what_the_config_says(torch_restored, deterministic):
    config = Config(cluster=ClusterConfig(device="cpu", deterministic=deterministic))
    for fix in (prepare_device, lambda config: fix_device(config.cluster, "cpu")):
        numerics.hand_over("cpu")
        assert fix(config) == torch.device("cpu")
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ[numerics.WORKSPACE] == ":4096:8"


# -- cuBLAS


@pytest.mark.parametrize(("value", "in_use"), [(None, False), (":4096:8", True), (":16:8", False)])
def test_a_workspace_that_is_known(monkeypatch, value, in_use):
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    if value:
        monkeypatch.setenv(numerics.WORKSPACE, value)
    numerics._check_workspace(in_use)


@pytest.mark.parametrize(
    ("value", "in_use", "said"),
    [(None, True, "uses the GPU already"), (":0:0", False, "CUBLAS_WORKSPACE_CONFIG=:0:0"), ("", False, ":16:8")],
)
def test_a_workspace_that_is_refused(monkeypatch, value, in_use, said):
    monkeypatch.delenv(numerics.WORKSPACE, raising=False)
    if value is not None:
        monkeypatch.setenv(numerics.WORKSPACE, value)
    with pytest.raises(ConfigError, match=said):
        numerics._check_workspace(in_use)


def test_an_engine_on_a_gpu_wants_fixed_kernels(monkeypatch):
    monkeypatch.setattr(numerics, "_is_fixed", False)
    numerics.require_fixed(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"numerics\.fix"):
        numerics.require_fixed(torch.device("cuda", 0))


# -- an operation without a deterministic form


def torchs_own_refusal() -> RuntimeError:
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        return raised.value
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def test_the_operation_is_named():
    refused = numerics.refusal(torchs_own_refusal())
    assert refused is not None and refused.operation == "put_"
    message, code = explain(refused)
    assert code == EXIT_USER_ERROR == 2
    assert message is not None and message.startswith("error: put_: ") and "cluster.deterministic=false" in message
    assert str(pickle.loads(pickle.dumps(refused))) == str(refused)


def test_eval_names_it_too():
    message, code = explain_eval(torchs_own_refusal())
    assert code == 2 and message is not None and "put_" in message and "cluster.deterministic" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...", "cumsum_cuda_kernel"),
        (
            "Deterministic behavior was enabled ... not deterministic because it uses CuBLAS and you have",
            "matrix product",
        ),
        ("torch.backends.cuda.matmul.allow_fp16_x(..., allow_splitk=False) requires the cuBLASLt backend", "cuBLASLt"),
    ],
)
def test_what_torch_says_on_a_gpu(text, named):
    """As written in torch's sources (Context.cpp, CUDABlas.cpp): such an error cannot be made on a CPU."""
    refused = numerics.refusal(RuntimeError(text))
    assert refused is not None and named in refused.operation


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error"),
        ValueError("put_ does not have a deterministic implementation"),
        WorkerLost("g", 0, "gone"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert numerics.refusal(error) is None


def test_a_refusal_is_never_tried_again():
    """Restarting would only meet it again; no worker needs to be asked for that."""
    refused = numerics.NotDeterministic("put_")
    with pytest.raises(numerics.NotDeterministic):
        diagnose(refused, workers=None, intact=True)  # type: ignore[arg-type]


# -- the key


def test_the_key_is_part_of_the_identity():
    strict, free = (
        flatten(Config(cluster=ClusterConfig(deterministic=value)), neutral_keys=False) for value in (True, False)
    )
    assert strict["cluster.deterministic"] is True
    with pytest.raises(ConfigError, match=r"cluster\.deterministic: True -> False"):
        refuse_changes(strict, free, [], "global_step_4")
    assert refuse_changes(strict, free, ["cluster.deterministic"], "global_step_4")


@pytest.mark.parametrize("deterministic", [True, False])
def test_opting_out_is_said_in_the_first_lines(tmp_path, capsys, monkeypatch, deterministic):
    """Before Ray is there; a run that is already there ends the start after these lines."""
    config = load([f"runner.output_dir={tmp_path}", f"cluster.deterministic={deterministic}"])
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.0)
    with lock.hold(make_directories(config.runner).checkpoints), pytest.raises(ConfigError, match="in use"):
        launch(config, ParentLink(), Stopwatch())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run: ")
    assert lines[1:] == ([] if deterministic else [f"!! {numerics.OPTED_OUT}"])
