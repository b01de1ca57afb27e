"""FSDP2 loads what FSDP1 saved and the other way round, also with another number of ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from rlinf_lite.checkpoint import Checkpointer
from rlinf_lite.checkpoint.formats.read_state import read_tensors


def build(kind, world_size):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 6))
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        mesh = init_device_mesh("cpu", (world_size,)) if kind == "fsdp1 with a mesh" else None
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), device_mesh=mesh, use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer


def step(model, optimizer, world_size):
    optimizer.zero_grad()
    torch.manual_seed(100 + dist.get_rank())
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def state_of(model, optimizer):
    """Tensors only: rates and betas are the script's."""
    weights, optim = get_state_dict(model, optimizer)
    return {"model": weights, "optim": optim["state"]}, optim["param_groups"]


def save(rank, world_size, root, kind):
    model, optimizer = build(kind, world_size)
    step(model, optimizer, world_size)
    state, _ = state_of(model, optimizer)
    return Checkpointer(root).save(1, state).path


def load_and_save(rank, world_size, path, root, kind):
    """Load into a model that was trained to other values, then save that again."""
    model, optimizer = build(kind, world_size)
    step(model, optimizer, world_size)
    step(model, optimizer, world_size)
    state, groups = state_of(model, optimizer)
    checkpointer = Checkpointer(root)
    checkpointer.load(path, state)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict={"state": state["optim"], "param_groups": groups},
    )
    state, _ = state_of(model, optimizer)
    return checkpointer.save(2, state).path


KINDS = ["fsdp1", "fsdp1 with a mesh", "fsdp2"]
PAIRS = [
    pytest.param(writer, reader, marks=[] if {writer, reader} == {"fsdp1", "fsdp2"} else pytest.mark.soak)
    for writer in KINDS
    for reader in KINDS
]


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_either_reads_what_the_other_wrote(run_ranks, tmp_path, writer, reader):
    first = run_ranks(save, 2, root=tmp_path, kind=writer)[0]
    second = run_ranks(load_and_save, 2, path=first, root=tmp_path, kind=reader)[0]
    assert_same_tensors(first, second, num_tensors=16)


def test_on_three_ranks(run_ranks, tmp_path):
    first = run_ranks(save, 2, root=tmp_path, kind="fsdp1")[0]
    second = run_ranks(load_and_save, 3, path=first, root=tmp_path, kind="fsdp2")[0]
    assert_same_tensors(first, second, num_tensors=16)


def assert_same_tensors(first, second, num_tensors):
    held, again = (
        read_tensors(path / "actor", wanted=lambda name: not name.startswith("rng.")) for path in (first, second)
    )
    assert held.keys() == again.keys() and len(held) == num_tensors
    for name, tensor in held.items():
        assert torch.equal(tensor, again[name]), name
