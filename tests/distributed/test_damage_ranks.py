"""Damage in the files of several ranks: reported on every rank, by the one pass that reads and hashes."""

import shutil
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, select
from rlinf_lite.checkpoint.errors import DamagedCheckpoint

ROWS = 8
FIRST, SECOND = "actor/__0_0.distcp", "actor/__1_0.distcp"


def make_state(mesh, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"w": distribute_tensor(torch.randn(ROWS, 64, generator=generator), mesh, [Shard(0)])}}


def save_two(rank, world_size, root):
    mesh = init_device_mesh("cpu", (world_size,))
    checkpointer = Checkpointer(root, seed=7)
    for step in (4, 8):
        checkpointer.save(step, make_state(mesh, step), data={"step": step}, info={})


def load_each(rank, world_size, paths):
    """What every rank hears of each checkpoint, and what it then has: no rank waits for one that gave up."""
    mesh = init_device_mesh("cpu", (world_size,))
    heard = {}
    for path in paths:
        state = make_state(mesh, 0)
        try:
            Checkpointer(Path(path).parent, seed=7).load(path, state, verify="full")
            heard[path] = ("loaded", state["model"]["w"].full_tensor())
        except CheckpointError as error:
            heard[path] = (type(error).__name__, str(error))
    return heard


def swap(path, other):
    between = (path / FIRST).rename(path / "between")
    (path / SECOND).rename(path / FIRST)
    between.rename(path / SECOND)


def take_a_shard_of_another_step(path, other):
    shutil.copy(other / SECOND, path / SECOND)


def copy_one_over_the_other(path, other):
    shutil.copy(path / FIRST, path / SECOND)


def flip_a_bit(path, other):
    content = bytearray((path / SECOND).read_bytes())
    content[len(content) // 2] ^= 4
    (path / SECOND).write_bytes(content)


def flip_a_bit_between_the_tensors(path, other):
    """Padding that nobody asks for."""
    content = bytearray((path / SECOND).read_bytes())
    content[-1] ^= 1
    (path / SECOND).write_bytes(content)


def lose(path, other):
    (path / SECOND).unlink()


def empty(path, other):
    (path / SECOND).write_bytes(b"")


def add_a_rank(path, other):
    shutil.copy(path / SECOND, path / "actor/__2_0.distcp")


DAMAGES = [
    swap, take_a_shard_of_another_step, copy_one_over_the_other, flip_a_bit, flip_a_bit_between_the_tensors, lose,
    empty, add_a_rank,
]  # fmt: skip


def test_damage_to_one_ranks_file_is_heard_by_all(run_ranks, tmp_path):
    run_ranks(save_two, 2, root=tmp_path / "good")
    directories = [tmp_path / "good" / f"global_step_{step}" for step in (4, 8)]
    sizes = {(directory / name).stat().st_size for directory in directories for name in (FIRST, SECOND)}
    assert len(sizes) == 1, "else a swap would be seen by sizes alone"
    paths = []
    for damage in DAMAGES:
        root = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "good", root)
        damage(root / "global_step_8", root / "global_step_4")
        chosen = select("auto", root, verify="full")
        assert chosen.path == root / "global_step_4", damage.__name__
        assert len(chosen.skipped) == 1
        assert str(root / "global_step_8") in chosen.skipped[0]
        paths += [str(root / "global_step_8"), str(root / "global_step_4")]

    for world_size in (2, 3, 1):
        answers = run_ranks(load_each, world_size, paths=paths)
        for damaged, good in zip(paths[::2], paths[1::2], strict=True):
            of_damaged = {answer[damaged] for answer in answers}
            assert len(of_damaged) == 1, "all ranks hear the same"
            ((kind, text),) = of_damaged
            assert kind == DamagedCheckpoint.__name__, damaged
            assert damaged in text
            of_good = [answer[good] for answer in answers]
            expected = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(4))
            assert all(kind == "loaded" and torch.equal(tensor, expected) for kind, tensor in of_good)
