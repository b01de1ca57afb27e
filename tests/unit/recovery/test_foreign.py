"""Starts from checkpoints of RLinf and Megatron-LM: converted once, with consent; or from their weights alone."""

from __future__ import annotations

import functools
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.config.compose import load
from rlinf_lite.errors import ConfigError
from rlinf_lite.models import hf_directory
from rlinf_lite.recovery.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FOREIGN = runpy.run_path(str(Path(__file__).parents[2] / "foreign_checkpoint.py"))
LAYOUT, NUM_STEPS = FOREIGN["LAYOUT"], FOREIGN["NUM_STEPS"]
ALLOWED = "runner.resume_allow_changes=['checkpoint (written by)']"
FEW = ("data.arithmetic.num_problems=24", "data.arithmetic.num_val_problems=8")
MEGATRON = ("actor.training_backend=megatron", "actor.megatron.make_vocab_size_divisible_by=2")


@pytest.fixture(scope="module")
def trained():
    model = AutoModelForCausalLM.from_pretrained(hf_directory.resolve("embedded:tiny-arithmetic"))
    return model, *FOREIGN["train"](model)


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The directories of RLinf's checkpoints, by what wrote them."""
    directory = tmp_path_factory.mktemp("rlinf")
    model, optimizer, scheduler = trained
    FOREIGN["write_fsdp"](directory / "fsdp/global_step_50", model, optimizer, scheduler)
    for name, dtype in (("megatron", torch.float32), ("bf16", torch.bfloat16)):
        FOREIGN["write_megatron"](directory / f"{name}/global_step_50", model, optimizer, size=2, step=50, dtype=dtype)
    return {name: directory / name / "global_step_50" for name in ("fsdp", "megatron", "bf16")}


def start(checkpoints, source, *overrides):
    config = composed(*overrides).model_copy(deep=True)
    config.runner.resume_dir = str(source)
    return prepare(config, checkpoints).start


@functools.cache
def composed(*overrides):
    return load(["runner.resume_dir=/elsewhere", *FEW, *overrides])


def adam_of(trained, part):
    model, optimizer, _ = trained
    return {name: optimizer.state[param][part] for name, param in model.named_parameters()}


@pytest.mark.parametrize("source", ["fsdp", "megatron", "bf16"])
def test_an_fsdp_run_gets_weights_and_optimizer_state(trained, written, tmp_path, capsys, source):
    found = start(tmp_path, written[source], ALLOWED)
    assert (found.committed_step, found.progress.cursor, found.selection.path) == (50, 0, tmp_path / "global_step_50")
    assert "wrote it; its weights and optimizer state are converted" in capsys.readouterr().out
    tensors = read_tensors(found.selection.path / "actor")
    for name, param in trained[0].named_parameters():
        assert torch.equal(tensors[f"model.{name}"], param), "of bf16 parameters the optimizer has float32 ones"
        assert tensors[f"optim.{name}.step"] == (NUM_STEPS if source == "fsdp" else 50)
        for part in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors[f"optim.{name}.{part}"], adam_of(trained, part)[name])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("source", ["fsdp", "megatron", "bf16"])
def test_a_megatron_run_gets_files_of_its_own_size(trained, written, tmp_path, source, size):
    found = start(tmp_path, written[source], *MEGATRON, f"actor.megatron.tensor_model_parallel_size={size}", ALLOWED)
    directory = found.selection.path / "actor/iter_0000050"
    assert sorted(path.name for path in directory.iterdir()) == [f"mp_rank_{rank:02d}" for rank in range(size)]
    model = trained[0]
    values = {"param": dict(model.named_parameters()), **{x: adam_of(trained, x) for x in ("exp_avg", "exp_avg_sq")}}
    for rank in range(size):
        held = torch.load(directory / f"mp_rank_{rank:02d}/distrib_optim.pt", weights_only=False)
        (buffer,) = held[0].values()
        for part, tensors in values.items():
            named = LAYOUT["rank_tensors"](model.config, tensors, size, rank, padded=128 * size)
            assert torch.equal(buffer[part], LAYOUT["flat"](named))
        about = torch.load(directory / f"mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
        steps = NUM_STEPS if source == "fsdp" else 50
        assert [group["step"] for group in about["optimizer"]["optimizer"]["param_groups"]] == [steps] * 2


def test_a_start_that_ended_before_its_first_step_is_repeated(written, tmp_path, capsys):
    first = start(tmp_path, written["fsdp"], ALLOWED).selection.path
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert start(tmp_path, written["fsdp"], ALLOWED).selection.path == first
    assert f"was converted to {first} before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert start(tmp_path, "auto", ALLOWED).selection.path == first
    shutil.copytree(first, tmp_path / "global_step_51")
    with pytest.raises(ConfigError, match=r"already holds global_step_51, and two runs would be mixed"):
        start(tmp_path, written["fsdp"], ALLOWED)


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("fsdp", (), r"RLinf wrote it\. Weights and optimizer state .* \"runner\.resume_allow_changes=\['checkpoint"),
        (
            "megatron",
            MEGATRON,
            r"Megatron-LM or RLinf wrote it\. Weights .* RNG state .* \"runner\.resume_allow_change",
        ),
        ("fsdp", ("critic.use_critic_model=true", "algorithm.adv_type=gae", ALLOWED), "critic is not converted"),
    ],
)
def test_refused(written, tmp_path, source, overrides, said):
    with pytest.raises(ConfigError, match=said):
        start(tmp_path, written[source], *overrides)
    assert list(tmp_path.iterdir()) == []


def test_another_checkpoint_of_the_same_program_is_not_taken_for_the_first(written, tmp_path):
    shutil.copytree(written["fsdp"], tmp_path / "second/global_step_50")
    first = start(tmp_path / "checkpoints", written["fsdp"], ALLOWED).selection.path
    with pytest.raises(
        ConfigError, match=r"already holds global_step_50, converted from .*fsdp/global_step_50/actor/d"
    ):
        start(tmp_path / "checkpoints", tmp_path / "second/global_step_50", ALLOWED)
    assert start(tmp_path / "checkpoints", written["fsdp"], ALLOWED).selection.path == first


WEIGHTS = "runner.resume_mode=weights"


@pytest.mark.parametrize("source", ["fsdp", "megatron", "bf16"])
def test_an_fsdp_run_begins_with_the_weights(trained, written, tmp_path, capsys, source):
    found = start(tmp_path, written[source], WEIGHTS)
    assert (found.committed_step, found.progress.step) == (None, 0), "a new run"
    assert "wrote it; its weights are converted" in capsys.readouterr().out
    assert found.weights.path.parent == tmp_path / "begun_from"
    tensors = read_tensors(found.weights.path / "actor")
    assert not any(name.startswith("optim.") for name in tensors)
    assert all(torch.equal(tensors[f"model.{name}"], param) for name, param in trained[0].named_parameters())


@pytest.mark.parametrize("source", ["fsdp", "megatron"])
def test_a_megatron_run_begins_with_the_weights(trained, written, tmp_path, source):
    found = start(tmp_path, written[source], *MEGATRON, WEIGHTS, "actor.megatron.tensor_model_parallel_size=2")
    model = trained[0]
    for rank in range(2):
        (path,) = found.weights.path.glob(f"actor/*/mp_rank_{rank:02d}")
        assert [file.name for file in path.iterdir()] == ["model_optim_rng.pt"]
        held = torch.load(path / "model_optim_rng.pt", weights_only=False)["model"]
        wanted = LAYOUT["rank_tensors"](model.config, dict(model.named_parameters()), 2, rank, padded=256)
        assert all(torch.equal(held[name], tensor) for name, tensor in wanted)


def test_other_weights_may_be_chosen_until_the_run_has_saved(written, tmp_path):
    first, again, other = (start(tmp_path, written[name], WEIGHTS).weights for name in ("fsdp", "fsdp", "bf16"))
    assert first.manifest.weights_fingerprint() == again.manifest.weights_fingerprint()
    assert other.manifest.info["converted_from"] == f"{written['bf16']}/actor/iter_0000050"
    assert [path.name for path in (tmp_path / "begun_from").iterdir()] == ["global_step_50"]
    own = start(tmp_path / "own", written["fsdp"], ALLOWED).selection.path
    shutil.copytree(own, tmp_path / "global_step_50")
    found = start(tmp_path, written["fsdp"], WEIGHTS, ALLOWED)
    assert (found.weights, found.selection.path) == (None, tmp_path / "global_step_50"), "it resumes its own"


def test_weights_begin_a_run_with_a_critic(written, tmp_path):
    assert start(tmp_path, written["fsdp"], WEIGHTS, "critic.use_critic_model=true", "algorithm.adv_type=gae").weights


def test_weights_alone_are_no_training_state(written, tmp_path):
    shutil.copytree(written["megatron"], tmp_path / "alone/global_step_50")
    for file in (tmp_path / "alone").rglob("distrib_optim.pt"):
        file.unlink()
    with pytest.raises(ConfigError, match="holds weights alone, so there is nothing to resume"):
        start(tmp_path / "checkpoints", tmp_path / "alone/global_step_50", ALLOWED)
    assert start(tmp_path / "checkpoints", tmp_path / "alone/global_step_50", WEIGHTS).weights


def test_one_of_ours_without_its_manifest_is_not_another_programs(written, tmp_path):
    ours = start(tmp_path / "one", written["megatron"], *MEGATRON, ALLOWED).selection.path
    (ours / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"a checkpoint of rlinf_lite that lost its manifest\.json"):
        start(tmp_path / "two", ours, *MEGATRON, ALLOWED)
