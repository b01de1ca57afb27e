"""CheckpointManager on several ranks, and loading their checkpoints in one process."""

import random

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlinf_lite.checkpoint import layout, select
from rlinf_lite.checkpoint.torch_api.manager import CheckpointManager


def make_both(seed, mesh=None, kind=torch.optim.AdamW, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3))
    if mesh is not None:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)  # with the last layer, which stays gathered after a forward
    return model, kind(model.parameters(), **{"lr": 0.1, **settings})


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()


def everything(model, optimizer):
    """All tensors by name, whole, as copies."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        found |= {f"optim.{name}.{key}": value for key, value in optimizer.state.get(param, {}).items()}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in found.items()}


def different(ours, theirs):
    return [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]


KINDS = {
    "AdamW": {"foreach": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"centered": True},
    "Adagrad": {},
    "NAdam": {},
}


def save_and_train_on(rank, world_size, root, mode):
    """Two steps, a save, two steps, for each kind of optimizer; returns the state at the save and at the end."""
    mesh, answers = init_device_mesh("cpu", (world_size,)), {}
    for kind, settings in KINDS.items():
        model, optimizer = make_both(0, mesh, getattr(torch.optim, kind), **settings)
        torch.manual_seed(rank)
        train(model, optimizer, 2)
        with torch.no_grad():
            model(torch.randn(1, 5))
        with CheckpointManager(root / kind, mode=mode) as manager:
            saved = everything(model, optimizer)
            with torch.no_grad():
                model(torch.randn(1, 5))
            manager.save(model, optimizer, {"epoch": 1, "reward": 0.5}, step=2)
            train(model, optimizer, 2)
        answers[kind] = saved, everything(model, optimizer)
    return answers


def load_and_train_on(rank, world_size, root):
    """What came, and the state after two steps more; the optimizers have never stepped."""
    mesh, answers = init_device_mesh("cpu", (world_size,)), {}
    for kind, settings in KINDS.items():
        model, optimizer = make_both(9, mesh, getattr(torch.optim, kind), **{**settings, "lr": 7.0})
        metadata = CheckpointManager(root / kind).load(model, optimizer)
        assert all(isinstance(value, DTensor) for value in model.state_dict().values())
        loaded = everything(model, optimizer)
        train(model, optimizer, 2)
        answers[kind] = metadata, loaded, everything(model, optimizer)
    return answers


@pytest.mark.parametrize("mode", [pytest.param("sync", marks=pytest.mark.soak), "async"])
def test_fully_sharded_models_resume_bit_exactly(run_ranks, tmp_path, mode):
    straight = run_ranks(save_and_train_on, 2, root=tmp_path, mode=mode)
    resumed = run_ranks(load_and_train_on, 2, root=tmp_path)
    for kind in KINDS:
        for (saved, final), (metadata, loaded, again) in zip(
            (answers[kind] for answers in straight), (answers[kind] for answers in resumed), strict=True
        ):
            assert metadata == {"epoch": 1, "reward": 0.5}
            assert len(saved) > 4
            assert different(saved, loaded) == [], kind
            assert different(final, again) == [], kind
            assert len(different(saved, final)) == len(saved), "nothing was trained"

    for kind, settings in KINDS.items():  # and in one process without a group
        model, optimizer = make_both(9, None, getattr(torch.optim, kind), **settings)
        with pytest.warns(UserWarning, match="written by 2 ranks, these are 1 .*: the RNG state starts anew"):
            assert CheckpointManager(tmp_path / kind).load(model, optimizer) == {"epoch": 1, "reward": 0.5}
        assert different(straight[0][kind][0], everything(model, optimizer)) == [], kind


def load_three(rank, world_size, root):
    """From one process to several."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, optimizer = make_both(9, mesh)
    metadata = CheckpointManager(root).load(model, optimizer)
    return metadata, everything(model, optimizer), random.random()


def test_what_one_process_saved_loads_on_three_ranks(run_ranks, tmp_path):
    model, optimizer = make_both(0)
    train(model, optimizer, 2)
    CheckpointManager(tmp_path).save(model, optimizer, {"epoch": 1})
    answers = run_ranks(load_three, 3, root=tmp_path)
    for metadata, loaded, _ in answers:
        assert metadata == {"epoch": 1}
        assert different(everything(model, optimizer), loaded) == []
    assert len({drawn for *_, drawn in answers}) == 3


def disagree(rank, world_size, root):
    """What one rank does wrong all ranks hear of; which step it is rank 0 says."""
    mesh, heard = init_device_mesh("cpu", (world_size,)), []
    model, optimizer = make_both(0, mesh)
    manager = CheckpointManager(root)
    foreign = make_both(0, mesh)[1] if rank == 1 else optimizer
    for metadata, given in (({"bad": {1} if rank == 1 else 1}, optimizer), ({}, foreign)):
        try:
            manager.save(model, given, metadata)
        except (TypeError, ValueError) as error:
            heard.append(f"{type(error).__name__}: {error} {error.__notes__}")
    report = manager.save(model, optimizer, {"step": 4 + rank})
    try:
        manager.load(model, foreign)
    except ValueError as error:
        heard.append(f"{type(error).__name__}: {error} {error.__notes__}")
    assert manager.load(model, optimizer, str(report.path) if rank == 0 else "/nowhere") == {"step": 4}
    return heard, report.step


def test_all_ranks_hear_what_one_did_wrong(run_ranks, tmp_path):
    (heard, step), other = run_ranks(disagree, 2, root=tmp_path)
    assert (heard, step) == other
    assert step == 4
    assert [text.split(":")[0] for text in heard] == ["TypeError", "ValueError", "ValueError"]
    assert all("on rank 1" in text for text in heard)
    assert "metadata['bad'] is a set" in heard[0]
    assert select("auto", tmp_path, verify="full").manifest.step == 4
    assert len(layout.committed(tmp_path)) == 1
