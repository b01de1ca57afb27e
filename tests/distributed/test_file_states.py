"""Sections of files in a layout of their own: two ranks as Megatron's, and a critic in DCP shards beside them."""

import io
import json
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlinf_lite.checkpoint import (
    Checkpointer,
    CheckpointError,
    Copied,
    MemoryCheckpoints,
    StateMismatch,
    layout,
    manifest,
    select,
)

TRACKER = "latest_checkpointed_iteration.txt"
OWN, FIRST, SECOND = "own.pt", "mp_rank_00", "mp_rank_01"


class Shards:
    """A `FileState` of a weight of 60,000 numbers, one half per rank of ``group``, with Adam's first moment."""

    def __init__(self, group, value=0.0):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        generator = torch.Generator().manual_seed(self.rank)
        self.weight = torch.randn(60_000 // self.size, generator=generator) + value
        self.moment = self.weight * 2
        self.updates = torch.tensor(value)

    def files(self, step):
        name = f"iter_{step:07d}/mp_rank_{self.rank:02d}/{OWN}"
        rng = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        content = {"weight": self.weight, "moment": Copied(self.moment.clone()), "updates": self.updates, "rng": rng}
        files = {name: content}
        return files | {TRACKER: str(step).encode()} if self.rank == 0 else files

    def load(self, names, read, *, weights_only):
        (step,) = {name.split("/")[0] for name in names} - {TRACKER}
        assert read(TRACKER) == step.removeprefix("iter_").lstrip("0").encode()
        if len(names) - 1 != self.size:
            raise StateMismatch("written by another number of ranks")
        held = read(f"{step}/mp_rank_{self.rank:02d}/{OWN}")
        self.weight.copy_(held["weight"])
        if weights_only:
            return False
        self.moment.copy_(held["moment"])
        self.updates.copy_(held["updates"])
        random.setstate(held["rng"]["python"])
        np.random.set_state(held["rng"]["numpy"])
        torch.set_rng_state(held["rng"]["torch"])
        return True

    def change(self):
        for tensor in (self.weight, self.moment, self.updates):
            tensor.fill_(-1)


def draw():
    return [random.random(), np.random.standard_normal(), torch.rand(()).item()]


def seed_with(seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def join(rank, world_size):
    """The section of this rank and the group of the actor's ranks: with three ranks the last one is a critic."""
    group = dist.new_group([0, 1][:world_size])
    return ("actor" if rank < 2 else "critic"), group


def state_of(section, group, value):
    return Shards(group, value) if section == "actor" else {"model": {"head": torch.full((3,), float(value))}}


def save_steps(rank, world_size, root, steps, background=False):
    """Save each step, and return what is drawn after the last save."""
    section, group = join(rank, world_size)
    seed_with(rank)
    checkpointer = Checkpointer(root, seed=7, section=section, timeout_seconds=20)
    for step in steps:
        state = state_of(section, group, step)
        if not background:
            checkpointer.save(step, state)
            continue
        checkpointer.start(step, state)
        checkpointer.fence()
        state.change() if section == "actor" else state["model"]["head"].fill_(-1)
        checkpointer.finish()
    return draw()


def load(rank, world_size, path, weights_only=False):
    section, group = join(rank, world_size)
    seed_with(100)
    state = state_of(section, group, -5)
    checkpointer = Checkpointer(path.parent, seed=7, section=section)
    try:
        asked = {} if weights_only and section == "critic" else state
        report = checkpointer.load(path, asked, whole=not weights_only)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    whole = (state.weight, state.moment, state.updates) if section == "actor" else (state["model"]["head"],)
    return whole, report.rng_restored, draw(), report.num_bytes


def expected(rank, step):
    if rank == 2:
        return (torch.full((3,), float(step)),)
    weight = torch.randn(30_000, generator=torch.Generator().manual_seed(rank)) + step
    return weight, weight * 2, torch.tensor(float(step))


def files_of(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("world_size", [2, 3], ids=["actor", "and a critic in shards"])
def test_everything_comes_back_and_the_background_writes_the_same_bytes(run_ranks, tmp_path, world_size):
    drawn = run_ranks(save_steps, world_size, root=tmp_path / "a", steps=[3])
    assert drawn == run_ranks(save_steps, world_size, root=tmp_path / "b", steps=[3], background=True)
    path = tmp_path / "a" / "global_step_3"
    held = files_of(path)
    critic = ["critic/.metadata", "critic/__0_0.distcp"] if world_size == 3 else []
    own = [f"actor/iter_0000003/{name}/{OWN}" for name in (FIRST, SECOND)]
    assert sorted(held) == sorted([*own, f"actor/{TRACKER}", *critic, "data/data.pt", "manifest.json"])
    assert held == files_of(tmp_path / "b" / "global_step_3")
    stock = torch.load(io.BytesIO(held[own[1]]), weights_only=False)
    assert torch.equal(stock["weight"], expected(1, 3)[0]) and stock["updates"] == 3

    answers = run_ranks(load, world_size, path=path)
    for rank, (state, restored, drawn_after, num_bytes) in enumerate(answers):
        assert all(map(torch.equal, state, expected(rank, 3))) and restored
        assert drawn_after == drawn[rank]
        assert num_bytes >= sum(len(held[name]) for name in own)
    for rank, (state, *_) in enumerate(run_ranks(load, world_size, path=path, weights_only=True)[:2]):
        assert torch.equal(state[0], expected(rank, 3)[0]) and torch.equal(state[1], expected(rank, -5)[1])


@pytest.mark.parametrize("killed, phase", [(1, "save.halfway"), (0, "save.metadata"), (0, "save.rename")])
def test_a_rank_killed_in_the_middle_of_a_save(start_ranks, run_ranks, tmp_path, killed, phase):
    fault = {"phase": phase, "step": 8, "action": "kill", "rank": killed}
    environment = {"RLINF_LITE_FAULTS": json.dumps([fault])}
    ranks = start_ranks(save_steps, 2, root=tmp_path, steps=[4, 8], background=True, environment=environment)
    ranks.processes[killed].join(60)
    assert ranks.processes[killed].exitcode == -9
    ranks.stop()
    assert select("auto", tmp_path, verify="full").manifest.step == 4
    assert len(layout.sweep(tmp_path)) <= 1  # none if the survivor has noticed and cleaned up
    assert [path.name for path in tmp_path.iterdir()] == ["global_step_4"]
    for rank, (state, *_) in enumerate(run_ranks(load, 2, path=tmp_path / "global_step_4")):
        assert all(map(torch.equal, state, expected(rank, 4)))


def test_a_flipped_bit_is_found_by_one_rank_and_raised_on_all(run_ranks, tmp_path):
    run_ranks(save_steps, 2, root=tmp_path, steps=[3])
    file = tmp_path / "global_step_3/actor/iter_0000003" / SECOND / OWN
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for answer in run_ranks(load, 2, path=tmp_path / "global_step_3"):
        assert answer.startswith("DamagedCheckpoint") and str(file) in answer


def through_memory(rank, world_size, step):
    """Take two replicas, change the state, and load the second one from the files of all ranks."""
    section, group = join(rank, world_size)
    seed_with(rank)
    replicas = MemoryCheckpoints(seed=7, section=section, timeout_seconds=20)
    state = state_of(section, group, step)
    replicas.take(step - 1, state)
    replica = replicas.take(step, state)
    drawn = draw()
    state = state_of(section, group, -5)
    of_ranks = replicas.ranks.gather((replica.shard, replica.small))
    files = {name: content for shard, small in of_ranks for name, content in {**shard, **small}.items()}
    report = replicas.load(step, files, state)
    whole = (state.weight, state.moment, state.updates) if section == "actor" else (state["model"]["head"],)
    return whole, report.rng_restored, drawn == draw(), sorted(replica.shard), manifest_of(files)


def manifest_of(files):
    return sorted(json.loads(files["manifest.json"].tobytes())["files"])


def test_replicas_in_memory_hold_the_same_files(run_ranks, tmp_path):
    run_ranks(save_steps, 3, root=tmp_path, steps=[6])
    on_disk = sorted(manifest.read(tmp_path / "global_step_6").files)
    for rank, (state, restored, same_draws, _, held) in enumerate(run_ranks(through_memory, 3, step=6)):
        assert all(map(torch.equal, state, expected(rank, 6))) and restored and same_draws
        assert held == on_disk
