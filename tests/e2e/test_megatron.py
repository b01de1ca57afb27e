"""Whole runs with Megatron-core and tensor parallelism 2: killed, resumed and resharded."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlinf_lite.cluster.forks.client import TEMPLATE_VARIABLE

pytestmark = pytest.mark.timeout(900)

MEGATRON = {
    "actor.training_backend": "megatron",
    "actor.megatron.tensor_model_parallel_size": "2",
    "actor.megatron.make_vocab_size_divisible_by": "2",
    "runner.max_steps": "4",
}
KL_AND_TWO_UPDATES = {"algorithm.kl_beta": "0.01", "algorithm.n_minibatches": "2"}
"""Passes of the reference and of the policy before the update."""
FP16 = {"actor.model.precision": "fp16", "actor.optim.loss_scale": "65536"}
AUTO = "runner.resume_dir=auto"
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "learn.py"


def hashes(run, step: int) -> dict[str, str]:
    """sha256 of each file of the actor's section, with the RNG states of all ranks, and of the data's."""
    directory = run.checkpoints / f"global_step_{step}"
    files = [path for part in ("actor", "data") for path in (directory / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.mark.soak  # shorter: tests/distributed/megatron/test_state.py; a whole run by default: test_foreign.py
@pytest.mark.parametrize(
    ("actors", "transport", "sequence_parallel", "precision"),
    [
        ("0-1", "shared_memory", "false", {}),
        ("0-3", "collective", "false", {}),
        ("0-3", "shared_memory", "true", {}),
        ("0-1", "object_store", "false", FP16),
    ],
    ids=["tensor parallel", "and data parallel", "and sequence parallel", "fp16"],
)
def test_killed_and_resumed(new_run, undisturbed, actors, transport, sequence_parallel, precision):
    overrides = {
        **precision,
        **MEGATRON,
        "actor.model.sequence_parallel": sequence_parallel,
        **KL_AND_TWO_UPDATES,
        "cluster.component_placement.actor": actors,
        "cluster.weight_sync": transport,
    }
    straight, run = (
        undisturbed(f"megatron {actors} {sequence_parallel} {len(precision)}", overrides),
        new_run(overrides),
    )
    printed = run.kill_when("step    3/4", faults=[{"phase": "save.manifest", "step": 3, "action": "hang"}])
    divided = " and sequence parallelism" * (sequence_parallel == "true")
    close = f"tensor parallelism 2{divided}: the engine's log-probs are close to the actor's, not bitwise identical"
    assert close in printed
    assert (
        "reproducible: yes; engine and trainer agree: no: " in printed and ", as this config lets expect (" in printed
    )
    assert run.steps() == [1, 2]
    printed = run.finish(AUTO)
    assert "resumed from global_step_2" in printed
    assert hashes(run, 4) == hashes(straight, 4)
    rank_files = "distrib_optim.pt", "model_optim_rng.pt"
    assert [name for name in hashes(run, 4) if name.startswith("actor/")] == [
        *(f"actor/iter_0000004/mp_rank_0{rank}/{name}" for rank in (0, 1) for name in rank_files),
        "actor/latest_checkpointed_iteration.txt",
    ]
    assert run.rows() == straight.rows() and run.samples() == straight.samples()


@pytest.mark.soak
def test_another_tensor_parallel_size(new_run, undisturbed):
    straight, run = (
        undisturbed("megatron", {**MEGATRON, "cluster.component_placement.actor": "0-1"}),
        new_run(
            {**MEGATRON, "actor.megatron.tensor_model_parallel_size": "1", "cluster.component_placement.actor": "0"}
        ),
    )
    shutil.copytree(straight.checkpoints / "global_step_3", run.checkpoints / "global_step_3")
    printed = run.finish(AUTO)
    assert "resumed from global_step_3" in printed
    # The weights are the same, the prompts and the noise too: so are the tokens of the next step.
    assert run.samples() == [row for row in straight.samples() if row["step"] == 4]


@pytest.mark.soak
def test_reward_above_nine_tenths(forks):
    """As the default run, in test_learns.py."""
    settings = [f"{key}={value}" for key, value in MEGATRON.items() if key.startswith("actor.")]
    command = [sys.executable, BENCHMARK, "cluster.warm_spares=0", *settings, "--seeds", "1"]
    environment = {**os.environ, TEMPLATE_VARIABLE: forks.name}
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stdout + shown.stderr
