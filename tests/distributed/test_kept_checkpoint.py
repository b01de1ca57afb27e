"""A checkpoint that was written before there were sections: it loads, and a state without a critic is still saved so.

`tests/data/before_sections.tar.xz` holds global_step_3, which two ranks wrote with `save` at commit 7063ee8.
"""

import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, flatten, manifest, state_digest
from rlinf_lite.checkpoint.formats.data_file import read_data
from rlinf_lite.checkpoint.formats.read_state import read_tensors

KEPT = Path(__file__).parents[1] / "data" / "before_sections.tar.xz"
STEP = 3


def full_state(seed):
    """What all ranks hold together."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"embed": torch.randn(7, 4, generator=generator), "bias": torch.randn(1, generator=generator)}
    moments = {
        name: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(weight.shape, generator=generator)}
        for name, weight in weights.items()
    }
    return {"model": weights, "optim": moments, "updates": torch.tensor(seed)}


def shard(value, mesh):
    if isinstance(value, dict):
        return {name: shard(part, mesh) for name, part in value.items()}
    return distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value.clone()


def draw():
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]


def seed_with(seed):
    """One draw, so that both kinds of Gaussian have a second value waiting."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return draw()


def save(rank, world_size, root):
    seed_with(rank)
    state = shard(full_state(STEP), init_device_mesh("cpu", (world_size,)))
    info = {"torch": torch.__version__, "numpy": np.__version__}
    Checkpointer(root, seed=7).save(STEP, state, data={"step": STEP}, info=info)


def load(rank, world_size, path):
    """The whole loaded state, and what the restored RNG state gives."""
    seed_with(100)
    state = shard(full_state(-1), init_device_mesh("cpu", (world_size,)))
    report = Checkpointer(path.parent, seed=7).load(path, state)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in flatten(state).items()}
    return whole, report.rng_restored, draw()


def assert_whole(loaded):
    expected = flatten(full_state(STEP))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


@pytest.fixture
def kept(tmp_path):
    with tarfile.open(KEPT) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path / "before_sections" / "global_step_3"


@pytest.mark.parametrize("world_size", [2, 1, 3])
def test_it_loads(run_ranks, kept, world_size):
    for rank, (whole, restored, drawn) in enumerate(run_ranks(load, world_size, path=kept)):
        assert_whole(whole)
        assert restored == (world_size == 2)
        if restored:
            seed_with(rank)
            assert drawn == draw()


def test_the_same_state_is_saved_in_the_same_layout(run_ranks, kept, tmp_path):
    """File names, keys of the manifest, names and bits of tensors; with the same torch, every byte."""
    run_ranks(save, 2, root=tmp_path)
    new = tmp_path / kept.name
    files = [sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file()) for path in (kept, new)]
    assert files[0] == files[1]
    old_text, new_text = (json.loads((path / "manifest.json").read_text()) for path in (kept, new))
    assert old_text.keys() == new_text.keys()
    assert old_text["files"].keys() == new_text["files"].keys()
    assert old_text["world_size"] == new_text["world_size"] == 2
    assert manifest.read(kept).ranks_of() == manifest.read(new).ranks_of() == {"actor": (0, 1)}
    assert read_data(kept) == read_data(new)
    old_tensors, new_tensors = read_tensors(kept / "actor"), read_tensors(new / "actor")
    assert old_tensors.keys() == new_tensors.keys()
    assert state_digest(old_tensors) == state_digest(new_tensors)
    if old_text["info"]["torch"] == torch.__version__:
        for file in files[0]:
            assert (kept / file).read_bytes() == (new / file).read_bytes() or file.name == "manifest.json", file
