"""The embedded default ends in recorded bits, and its engine's log-probs are the trainer's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlinf_lite.checkpoint.digest import state_digest
from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE, ForkServer
from rlinf_lite.observability import read_events
from rlinf_lite.observability.events import CHECK, START
from rlinf_lite.observability.hub import METRICS_FILE

STEPS = 8
GAP = "policy/rollout_logprob_gap"
SPEED = (
    *(f"time/{phase}" for phase in ("sync", "rollout", "reward", "update", "step")),
    *(f"throughput/{name}" for name in ("tokens_per_second", "tokens_per_second_per_slot", "mfu")),
)
"""Stand in every row."""
# sha256 of parameters, optimizer state and counters after 8 steps, by processor and version of torch. A new line here
# is a change of numbers, and needs a line in CHANGELOG.md.
RECORDED = {
    "AuthenticAMD AVX2, torch 2.13.0": "868faddc039b35c4a790879a5023eb391bfdb9b4e62e8d580a2d28b04d56bb22",
    "AuthenticAMD AVX512, torch 2.13.0": "a1e6b636ae3df91c166bd30f600573c0b89458eb6d28dc2d9e9263d3bc7f5546",
}


def processor() -> str:
    """What decides which kernels torch chooses: the vendor, the instruction set, and torch itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    version = torch.__version__.partition("+")[0]
    return f"{vendor} {torch.backends.cpu.get_cpu_capability()}, torch {version}"


@pytest.fixture(autouse=True)
def fork_workers_from_here(forks: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEMPLATE_VARIABLE, forks.name)


def start_plainly(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run_digest(output_dir: Path, *overrides: str, steps: int = STEPS, start: Callable[..., Any] = start_plainly) -> str:
    """Train the embedded default for some steps; returns the sha256 of the state that it saves."""
    settings = [f"runner.max_steps={steps}", f"runner.save_interval={steps}", f"runner.output_dir={output_dir}"]
    settings.append("rollout.return_logprobs=true")
    command = [sys.executable, "-m", "rlinf_lite.main_math", *settings, "cluster.warm_spares=0", *overrides]
    environment = {**os.environ, "RAY_ADDRESS": os.environ.get("RLINF_LITE_TEST_RAY", "local")}
    process = start(command, environment)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    checked = "\nreproducible: yes; engine and trainer agree: yes ("
    assert printed.count(checked) == printed.count("reproducible: ") == 1, printed
    run = output_dir / "grpo-tiny-arithmetic"
    assert [event.kind for event in read_events(run / "events.jsonl")][:2] == [START, CHECK]
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    gaps = [row[GAP] for row in rows if GAP in row]
    assert gaps == [0.0] * steps, "the engine's log-probs are not the trainer's"
    assert all(row[name] > 0 for row in rows for name in SPEED)
    actor = run / "checkpoints" / f"global_step_{steps}" / "actor"
    return state_digest(read_tensors(actor, lambda name: not name.startswith("rng.")))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_old_log_probs_of_the_engine_are_those_of_a_pass(tmp_path: Path, start_forked: Callable[..., Any]) -> None:
    """The correction of a mismatch asks for the pass, and then multiplies the losses by exp(0)."""
    given = ("algorithm.n_minibatches=2", "algorithm.sampling_params.temperature=0.8", "algorithm.mask_truncated=true")
    saved = run_digest(tmp_path / "engine", *given, steps=3, start=start_forked)
    fixed = "algorithm.importance_sampling_fix=true"
    assert run_digest(tmp_path / "pass", *given, fixed, steps=3, start=start_forked) == saved


@pytest.mark.timeout(900)
def test_the_embedded_default_ends_in_recorded_bits(tmp_path: Path) -> None:
    digest = run_digest(tmp_path / "default")
    recorded = RECORDED.get(processor())
    if recorded is None:  # another processor: neither workers nor rows at once change a bit
        others = ("cluster.component_placement.rollout=0-1", "rollout.max_running_requests=48")
        recorded = run_digest(tmp_path / "other", *others)
    assert digest == recorded, f"on {processor()}"
