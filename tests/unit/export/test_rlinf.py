"""RLinf's own FSDP checkpoints, saved here as RLinf does, become checkpoints to resume from."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch

from rlinf_lite.checkpoint import Checkpointer, manifest, read_data
from rlinf_lite.recovery.records import check_info
from rlinf_lite.ties import tied_names
from rlinf_lite.training.fsdp.state import optimizer_state
from rlinf_lite.weights.names import named_weights

TOOLS = Path(__file__).parents[3] / "toolkits" / "ckpt_convertor"
FOREIGN = runpy.run_path(str(Path(__file__).parents[2] / "foreign_checkpoint.py"))

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def trained(make_model, tmp_path):
    """A model after some optimizer steps, its optimizer, and RLinf's checkpoint of it."""

    def train(family, tied):
        model = make_model(family, tied)
        optimizer, scheduler = FOREIGN["train"](model)
        checkpoint = tmp_path / "rlinf/global_step_50"
        FOREIGN["write_fsdp"](checkpoint, model, optimizer, scheduler)
        return model, optimizer, checkpoint

    return train


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_weights_and_optimizer_state_are_loaded(trained, make_model, base_of, tool, tmp_path, family, tied):
    model, optimizer, checkpoint = trained(family, tied)
    convert = tool(TOOLS / "convert_rlinf_to_dcp.py")
    code, printed = convert(dcp_path=checkpoint, base_model=base_of(model), output_path=tmp_path / "ours")
    assert code == 0, printed
    path = tmp_path / "ours/global_step_50"

    other = make_model(family, tied, seed=7)
    adam = {
        name: {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, p in other.named_parameters()
    }
    state = {"model": dict(named_weights(other)), "optim": adam, "lr_scheduler": {"num_updates": torch.tensor(0)}}
    report = Checkpointer(tmp_path / "ours").load(path, state)
    assert not report.rng_restored
    assert state["lr_scheduler"]["num_updates"] == FOREIGN["NUM_STEPS"]
    theirs = optimizer_state(dict(model.named_parameters()), optimizer)
    for name, param in named_weights(model):
        assert torch.equal(state["model"][name], param), name
    for name, moments in theirs.items():
        assert all(torch.equal(adam[name][key], tensor) for key, tensor in moments.items()), name

    about = manifest.read(path)
    check_info(about.info)
    assert (about.step, read_data(path)) == (50, {})
    assert about.info["written_by"] == "RLinf" and about.info["tied"] == tied_names(model)


def test_refusals(trained, base_of, tool, assert_refused, tmp_path):
    model, _, checkpoint = trained("llama", False)
    convert = tool(TOOLS / "convert_rlinf_to_dcp.py")
    flags = {"base_model": base_of(model), "output_path": tmp_path / "ours"}
    shutil.copytree(checkpoint / "actor/dcp_checkpoint", tmp_path / "unnamed")
    assert_refused(convert(dcp_path=tmp_path / "unnamed", **flags), "is in no global_step_N directory")
    assert convert(dcp_path=checkpoint, **flags)[0] == 0
    assert_refused(convert(dcp_path=checkpoint, **flags), "exists already")
    assert_refused(convert(dcp_path=tmp_path / "ours/global_step_50", **flags), "is a checkpoint of rlinf_lite already")
