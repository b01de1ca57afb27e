"""Tensors that are read in blocks of rows: each comes back exactly, also a part of it, and damage is noticed."""

import functools
import io
import os
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from rlinf_lite.checkpoint import Checkpointer, DamagedCheckpoint
from rlinf_lite.checkpoint.formats.read_ahead import PIECE_BYTES
from rlinf_lite.checkpoint.formats.read_state import read_tensors
from rlinf_lite.checkpoint.formats.tensor_file import EDGE_BYTES, EntryDecoder

SHAPES = {
    "rows that do not fill a block": (1100, 999),
    "one dimension": (3_000_001,),
    "a row as long as a block": (3, PIECE_BYTES // 4),
    "a row longer than a block": (2, PIECE_BYTES // 4 + 1),
    "three dimensions": (5, 700, 333),
    "small": (4, 5),
}


@functools.cache
def make_state():
    """Shared by all tests, which must not change it."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["half"] = torch.randn(2000, 1500, generator=generator).bfloat16()
    tensors["transposed"] = torch.randn(1500, 1000, generator=generator).t()
    return {"model": tensors}


def zeros_like(state):
    return {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of `make_state`, which no test may change."""
    return Checkpointer(tmp_path_factory.mktemp("run"), seed=7).save(1, make_state(), data={}, info={}).path


@pytest.mark.parametrize("verify", ["full", "size"])
def test_they_come_back(saved, verify):
    state = zeros_like(make_state())
    Checkpointer(saved.parent, seed=7).load(saved, state, verify=verify)
    assert_equal(state["model"], make_state()["model"])


def test_those_of_torch_come_back(tmp_path):
    dcp.save(make_state(), checkpoint_id=tmp_path)
    read = read_tensors(tmp_path)
    assert_equal({name.removeprefix("model."): tensor for name, tensor in read.items()}, make_state()["model"])


# In a process of its own: torch remembers the shards of the first rank that a process was.
READ_PARTS = """
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from rlinf_lite.checkpoint.formats.dcp_reader import ShardReader

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    mesh = dist.init_device_mesh("cpu", (3,))
    for placement in (Shard(0), Shard(1), Replicate()):
        whole = {name: tensor for name, tensor in tensors.items() if tensor.dim() > 1 or placement != Shard(1)}
        wanted = {name: distribute_tensor(one, mesh, [placement], src_data_rank=None) for name, one in whole.items()}
        state = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        ShardReader(directory).read({"model": state})
        for name, tensor in state.items():
            assert torch.equal(tensor.to_local(), wanted[name].to_local()), (placement, name)
"""


@pytest.mark.parametrize("rank", range(3))
def test_a_part_comes_back(saved, run_script, rank):
    assert run_script(READ_PARTS, rank=rank, directory=saved / "actor", tensors=make_state()["model"]) == 0


def test_a_changed_byte_anywhere_is_noticed(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / saved.name)
    copy, state = Checkpointer(tmp_path, seed=7), zeros_like(make_state())
    copy.load(path, state)
    with (path / "actor" / "__0_0.distcp").open("r+b", buffering=0) as shard:
        size = shard.seek(0, io.SEEK_END)
        for at in range(0, size, size // 6):
            sound = os.pread(shard.fileno(), 1, at)
            os.pwrite(shard.fileno(), bytes([sound[0] ^ 1]), at)
            with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp"):
                copy.load(path, state)
            os.pwrite(shard.fileno(), sound, at)


def test_the_first_and_last_bytes_tell_the_form():
    content = saved_by_torch(torch.arange(10**6))
    form = form_of(content)
    assert (form.dtype, form.shape) == (torch.int64, torch.Size([10**6]))
    assert content[len(form.head) : form.end] == torch.arange(10**6).numpy().tobytes()


def test_values_that_lie_elsewhere_have_no_form():
    tensor = torch.arange(10**6)
    assert form_of(saved_by_torch(tensor[:100])) is None  # after the values come those that are not its own
    assert form_of(saved_by_torch([tensor, tensor + 1])) is None
    assert form_of(saved_by_torch(tensor.view(1000, 1000).t())) is None
    assert form_of(b"\0" * 10**6) is None


def saved_by_torch(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def form_of(content):
    reads = []

    def read(at, view):
        reads.append(len(view))
        view[:] = content[at : at + len(view)]

    form = EntryDecoder().form(len(content), read)
    assert reads == [EDGE_BYTES, EDGE_BYTES]
    return form
