"""Whole runs with vLLM: they learn, and killed ones end bit-equal to an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import psutil
import pytest

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: bash toolkits/vllm/install_cpu.sh", allow_module_level=True)
pytestmark = [pytest.mark.timeout(1200), pytest.mark.xdist_group("e2e")]
VLLM = {
    "rollout.rollout_backend": "vllm",
    "rollout.return_logprobs": "true",
    "actor.model.model_path": "embedded:tiny-arithmetic-2heads",
    "runner.max_steps": "6",
}
TWO_WORKERS = {"cluster.component_placement.rollout": "0-1", "cluster.weight_sync": "collective"}


@pytest.fixture(scope="module")
def straight(undisturbed):
    """1 engine, weights over the object store, never killed."""
    return undisturbed("with_vllm", VLLM)


def test_the_embedded_default_learns(tmp_path):
    """By the shipped config; truncated importance sampling takes the engine's log-probs."""
    settings = (f"runner.output_dir={tmp_path}", "runner.max_steps=10", "algorithm.importance_sampling_fix=true")
    command = [sys.executable, "-m", "rlinf_lite.main_math", "grpo-tiny-arithmetic-vllm", *settings]
    env = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout
    lines = (tmp_path / "grpo-tiny-arithmetic-vllm" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rewards = [row["reward/mean"] for row in rows]
    assert rewards[0] < 0.5 and min(rewards[-3:]) > 0.75, rewards
    assert 0 < max(row["policy/rollout_logprob_gap"] for row in rows) < 1e-5


def test_killed_and_resumed_on_another_number_of_engines(straight, new_run, same_run):
    """kill -9 of the driver, then two engines that the weights are broadcast to."""
    run = new_run(VLLM)
    run.kill_when("step    4/6")
    printed = run.finish("runner.resume_dir=auto", *(f"{key}={value}" for key, value in TWO_WORKERS.items()))
    assert "resumed from global_step_" in printed
    same_run(straight, run, 6)


def test_an_engine_that_dies_is_replaced(straight, new_run, same_run):
    run = new_run(VLLM)
    process = run.start()
    run.read_until(process, "step    2/6")
    workers = psutil.Process(process.pid).children(recursive=True)
    next(worker for worker in workers if "ray::RolloutGroup" in " ".join(worker.cmdline())).kill()
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and "RolloutGroup rank 0" in printed, printed
    same_run(straight, run, 6)
