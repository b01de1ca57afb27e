"""Whole runs that resume from checkpoints of RLinf, made here by a script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.export.megatron_path import located_megatron
from rlinf_lite.models import hf_directory
from rlinf_lite.models.build import build_on_meta
from rlinf_lite.weights.megatron.architecture import Architecture
from rlinf_lite.weights.megatron.source import MegatronWeights
from rlinf_lite.weights.names import WeightNames

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

DOCS = Path(__file__).parents[2] / "docs"
FOREIGN = runpy.run_path(str(Path(__file__).parents[1] / "foreign_checkpoint.py"))
LAYOUT = FOREIGN["LAYOUT"]
ALLOWED = "runner.resume_allow_changes=['checkpoint (written by)']"
ONE_MORE = {"runner.max_steps": "51", "runner.val_check_interval": "-1"}
MEGATRON = {
    "actor.training_backend": "megatron",
    "actor.megatron.tensor_model_parallel_size": "2",
    "actor.megatron.make_vocab_size_divisible_by": "2",
}
NO_RATE = {"actor.optim.lr": "0.0", "actor.optim.min_lr": "0.0"}
"""No weight moves, so that the next checkpoint shows which weights were resumed from."""


@pytest.fixture
def trained():
    model = AutoModelForCausalLM.from_pretrained(hf_directory.resolve("embedded:tiny-arithmetic"))
    return model, *FOREIGN["train"](model)


def after_one_step(run, source) -> str:
    printed = run.finish(f"runner.resume_dir={source}", ALLOWED)
    assert "resumed from global_step_50" in printed and "continuing with step 51" in printed
    assert "has no RNG state: each rank's is derived from (seed, step, rank)" in printed
    assert "wrote it: data and counters of samples and tokens begin anew, after step 50" in printed
    assert run.steps() == [50, 51] and [row["step"] for row in run.rows()] == [51]
    return printed


def test_fsdp(new_run, trained, tmp_path):
    model, optimizer, scheduler = trained
    FOREIGN["write_fsdp"](tmp_path / "rlinf/global_step_50", model, optimizer, scheduler)
    run = new_run(ONE_MORE | NO_RATE)
    after_one_step(run, tmp_path / "rlinf/global_step_50")
    shards = re.search(r"(?m)^ +actor/(\.metadata.*?) \.\.\.", (DOCS / "checkpointing.md").read_text())[1].split()
    documented = [*(f"actor/{name}" for name in shards), "data/data.pt", "manifest.json"]
    assert files_of(run.checkpoints / "global_step_51") == [f"global_step_51/{name}" for name in documented]
    tensors = read_tensors(run.checkpoints / "global_step_51" / "actor")
    for name, param in model.named_parameters():
        assert torch.equal(tensors[f"model.{name}"], param)
        assert tensors[f"optim.{name}.step"] == FOREIGN["NUM_STEPS"] + 1
        # A rest of the moment that the three steps left: its gradients were far larger than those of the step here.
        before = 0.95 * optimizer.state[param]["exp_avg_sq"]
        torch.testing.assert_close(
            tensors[f"optim.{name}.exp_avg_sq"], before, rtol=0.02, atol=float(before.max()) / 100
        )


def files_of(directory):
    return sorted(path.relative_to(directory.parent).as_posix() for path in directory.rglob("*") if path.is_file())


def documented_tree(page, *, step):
    """The files in a page's tree of a checkpoint, of step 50 there, as paths."""
    (block,) = re.findall(r"```\n(global_step_50/\n.*?)```", (DOCS / page).read_text(), re.DOTALL)
    found, above = [], []
    for line in block.splitlines():
        name = line.strip()
        above[(len(line) - len(line.lstrip())) // 4 :] = [name]
        if not name.endswith("/"):
            found.append("".join(above))
    return sorted(path.replace("step_50", f"step_{step}").replace("iter_0000050", f"iter_{step:07d}") for path in found)


def write(program, directory, trained):
    """A checkpoint of RLinf that FSDP, or one tensor-parallel rank, wrote."""
    model, optimizer, scheduler = trained
    if program == "fsdp":
        FOREIGN["write_fsdp"](directory, model, optimizer, scheduler)
    else:
        FOREIGN["write_megatron"](directory, model, optimizer, size=1, step=50)


@pytest.mark.parametrize("program", [pytest.param("fsdp", marks=pytest.mark.soak), "megatron"])
def test_megatron(new_run, trained, tmp_path, program):
    """Two tensor-parallel ranks resume."""
    model, optimizer, _ = trained
    write(program, tmp_path / "rlinf/global_step_50", trained)
    run = new_run(ONE_MORE | NO_RATE | MEGATRON)
    after_one_step(run, tmp_path / "rlinf/global_step_50")
    assert files_of(run.checkpoints / "global_step_51") == documented_tree("megatron.md", step=51)
    second = {name: optimizer.state[param]["exp_avg_sq"] for name, param in model.named_parameters()}
    for rank in (0, 1):
        files = run.checkpoints / f"global_step_51/actor/iter_0000051/mp_rank_{rank:02d}"
        (buffer,) = torch.load(files / "distrib_optim.pt", weights_only=False)[0].values()
        params, before = (
            LAYOUT["flat"](LAYOUT["rank_tensors"](model.config, tensors, 2, rank, padded=20))
            for tensors in (dict(model.named_parameters()), second)
        )
        assert torch.equal(buffer["param"], params)
        torch.testing.assert_close(buffer["exp_avg_sq"], 0.95 * before, rtol=0.02, atol=float(before.max()) / 100)


@pytest.mark.soak  # shorter: tests/unit/recovery/test_foreign.py
@pytest.mark.parametrize(("program", "backend"), [("megatron", {}), ("fsdp", MEGATRON)])
def test_a_new_run_begins_with_the_weights(new_run, trained, tmp_path, program, backend):
    """Of the other backend, and the same command resumes the run afterwards."""
    write(program, tmp_path / "rlinf/global_step_50", trained)
    run = new_run(ONE_MORE | {"runner.max_steps": "1"} | NO_RATE | backend)
    weights = (f"runner.resume_dir={tmp_path / 'rlinf/global_step_50'}", "runner.resume_mode=weights")
    printed = run.finish(*weights)
    assert "wrote it; its weights are converted" in printed
    assert "a new run, with the model weights of step 50" in printed
    assert run.steps() == [1] and [row["step"] for row in run.rows()] == [1]
    params, num_steps = read_policy(run.checkpoints / "global_step_1")
    assert num_steps == 1
    assert all(torch.equal(params[name], param) for name, param in trained[0].named_parameters())
    longer = ("runner.max_steps=2", "runner.resume_allow_changes=[actor.optim.total_training_steps]")
    assert "resumed from global_step_1" in run.finish(*weights, *longer)


def read_policy(checkpoint):
    """Its parameters by the model's names, and how many optimizer steps were taken."""
    if (checkpoint / "actor/.metadata").is_file():
        tensors = read_tensors(checkpoint / "actor")
        params = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        return params, int(next(tensor for name, tensor in tensors.items() if name.endswith(".step")))
    config = hf_directory.load_config(hf_directory.resolve("embedded:tiny-arithmetic"), None)
    with located_megatron(checkpoint) as source:
        files = source.files(Architecture.of(config))
        held = MegatronWeights(files, WeightNames.of(build_on_meta(config, "fp32")))
        return {name: held.read(name) for name in held.shapes}, files.num_optimizer_steps
