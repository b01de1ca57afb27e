"""Replicas of several ranks, loaded by the same or another number of new processes from the files that they need."""

import json
import pickle
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite import faults
from rlinf_lite.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    MemoryCheckpoints,
    RankSilent,
    flatten,
    state_digest,
)
from rlinf_lite.checkpoint.memory.replica import read_small

ROWS = 7
"""Not a multiple of 2 or 3: shards differ in size."""
SMALL = ["actor/.metadata", "data/data.pt", "manifest.json"]


def full_state(seed):
    """What all ranks hold together."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"embed": torch.randn(ROWS, 4, generator=generator), "bias": torch.randn(1, generator=generator)}
    moments = {
        name: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(weight.shape, generator=generator)}
        for name, weight in weights.items()
    }
    return {"model": weights, "optim": moments, "updates": torch.tensor(seed)}


def shard(value, mesh):
    """Tensors with rows are sharded; scalars, of which one rank's shard has all, are kept by every rank."""
    if isinstance(value, dict):
        return {name: shard(part, mesh) for name, part in value.items()}
    return distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value.clone()


def draw():
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]


def take(rank, world_size, steps):
    """Each step's replica, and what is drawn after it."""
    mesh = init_device_mesh("cpu", (world_size,))
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    checkpoints, taken = MemoryCheckpoints(seed=7), []
    for step in steps:
        replica = checkpoints.take(step, shard(full_state(step), mesh), data={"step": step}, info={"run": "x"})
        taken.append((replica, draw()))
    return taken


def load(rank, world_size, step, files):
    """Load this rank's files into another state and RNG state; returns the loaded state or the error."""
    mesh = init_device_mesh("cpu", (world_size,))
    random.seed(100), np.random.seed(100), torch.manual_seed(100)
    state = shard(full_state(-1), mesh)
    given = {name: np.frombuffer(content, np.uint8) for name, content in files[rank].items()}
    try:
        report = MemoryCheckpoints(seed=7).load(step, given, state)
    except CheckpointError as error:
        return type(error), " ".join([str(error), *getattr(error, "__notes__", ())])
    drawn = draw()
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in flatten(state).items()}
    return whole, report.rng_restored, drawn, pickle.loads(pickle.dumps(report)) == report


@pytest.fixture(scope="module")
def taken():
    """Filled by the first test that asks: replicas of steps 3 and 4 of two ranks."""
    return {}


@pytest.fixture
def replicas(taken, run_ranks):
    if not taken:
        taken["ranks"] = run_ranks(take, 2, steps=[3, 4])
    return taken["ranks"]


def small_of(replicas, index=0):
    return {name: content.tobytes() for name, content in replicas[0][index][0].small.items()}


def shards_of(replicas, index=0):
    return [{n: c.tobytes() for n, c in of_rank[index][0].shard.items()} for of_rank in replicas]


def assert_whole(loaded, step):
    expected = flatten(full_state(step))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("index", [0, 1], ids=["planned", "as the last"])
@pytest.mark.parametrize("all_shards", [False, True])
def test_as_many_new_processes_get_all_back(replicas, run_ranks, index, all_shards):
    small, shards = small_of(replicas, index), shards_of(replicas, index)
    assert sorted(small) == SMALL
    assert [list(part) for part in shards] == [["actor/__0_0.distcp"], ["actor/__1_0.distcp"]]
    assert replicas[1][index][0].small == {}
    files = [small | (shards[0] | shards[1] if all_shards else own) for own in shards]
    answers = run_ranks(load, 2, step=3 + index, files=files)
    for rank, (whole, restored, drawn, report_travels) in enumerate(answers):
        assert_whole(whole, 3 + index)
        assert restored and report_travels
        assert drawn == replicas[rank][index][1]
    assert answers[0][2] != answers[1][2]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("given", ["all", "least"])
def test_another_number_of_ranks(replicas, run_ranks, world_size, given):
    small, shards = small_of(replicas), shards_of(replicas)
    files = [
        small
        | {n: c for r, part in enumerate(shards) if given == "all" or r % world_size == rank for n, c in part.items()}
        for rank in range(world_size)
    ]
    answers = run_ranks(load, world_size, step=3, files=files)
    for whole, restored, *_ in answers:
        assert_whole(whole, 3)
        assert not restored
    assert len({tuple(drawn) for _, _, drawn, _ in answers}) == world_size


def flipped(content):
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 4
    return bytes(damaged)


def load_each(rank, world_size, cases):
    """`load` of step 3 with one set of files after the other: a failure leaves nothing in the way of the next."""
    return [load(rank, world_size, step=3, files=files) for files in cases]


def test_a_flipped_bit_in_what_one_rank_was_given_is_heard_by_all(replicas, run_ranks):
    whole = [small_of(replicas) | own for own in shards_of(replicas)]
    places = [(rank, name) for rank in (0, 1) for name in whole[rank]]
    assert len(places) == 8
    cases = [
        [{**files, name: flipped(files[name])} if r == rank else files for r, files in enumerate(whole)]
        for rank, name in places
    ]
    for heard in run_ranks(load_each, 2, cases=[*cases, whole]):
        for (rank, name), (kind, message) in zip(places, heard[:-1], strict=True):
            assert issubclass(kind, DamagedCheckpoint)
            assert f"(memory)/global_step_3/{name}" in message and f"on rank {rank}" in message
        assert_whole(heard[-1][0], 3)


def test_damage_in_one_copy_of_a_shard_that_all_were_given(replicas, run_ranks):
    """Each of three ranks reads from a copy of its own: those of the others being whole does not help."""
    whole = small_of(replicas) | {name: content for own in shards_of(replicas) for name, content in own.items()}
    damaged = {**whole, "actor/__0_0.distcp": flipped(whole["actor/__0_0.distcp"])}
    cases = [[damaged if r == rank else whole for r in range(3)] for rank in range(3)]
    for heard in run_ranks(load_each, 3, cases=cases):
        for rank, (kind, message) in enumerate(heard):
            assert issubclass(kind, DamagedCheckpoint) and f"on rank {rank}" in message


def test_files_of_different_replicas_or_too_few(replicas, run_ranks):
    small, other_small = small_of(replicas, 0), small_of(replicas, 1)
    (first, second), later = shards_of(replicas, 0), shards_of(replicas, 1)[1]
    cases = {
        "__1_0.distcp: its blake3 is not the one in the manifest on rank 1": [small | first, small | later],
        "actor/__1_0.distcp is missing from the files that rank 1 was given on rank 1": [small | first, small | first],
        "the directory says step 3, its manifest says 4 on rank 1": [small | first, other_small | second],
    }
    for heard in run_ranks(load_each, 2, cases=list(cases.values())):
        for expected, (kind, message) in zip(cases, heard, strict=True):
            assert issubclass(kind, DamagedCheckpoint) and expected in message


def test_manifests_that_differ_though_each_is_whole(replicas, run_ranks):
    small, (first, second) = small_of(replicas), shards_of(replicas)
    held = read_small(3, {name: np.frombuffer(content, np.uint8) for name, content in small.items()})[0]
    other = small | {"manifest.json": replace(held, info={"run": "y"}).to_json().encode()}
    for kind, message in run_ranks(load, 2, step=3, files=[small | first, other | second]):
        assert kind is DamagedCheckpoint and "the ranks were given files of different replicas" in message


def train(rank, world_size, resume_from):
    """Six steps of a fully sharded model with a replica after each; or the last three, from the third replica."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for param in model.parameters():
        zeros = {name: torch.zeros_like(param.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
    state = {"model": model, "optim": {name: optimizer.state[param] for name, param in model.named_parameters()}}
    torch.manual_seed(rank)
    checkpoints, kept = MemoryCheckpoints(seed=7), []
    if resume_from is not None:
        checkpoints.load(3, resume_from[rank], state)
    for step in range(4, 7) if resume_from else range(1, 7):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append(checkpoints.take(step, state))
    return state_digest(flatten(state)), kept


def test_a_fully_sharded_model_trains_on_to_the_same_bits(run_ranks):
    straight = run_ranks(train, 2, resume_from=None)
    small = straight[0][1][2].small
    resumed = run_ranks(train, 2, resume_from=[small | kept[2].shard for _, kept in straight])
    for (digest, kept), (again, kept_again) in zip(straight, resumed, strict=True):
        assert digest == again
        for one, other in zip(kept[3:], kept_again, strict=True):
            assert {n: c.tobytes() for n, c in one.shard.items()} == {n: c.tobytes() for n, c in other.shard.items()}


def take_after_trouble(rank, world_size):
    """How a take ended on this rank, after how many seconds."""
    checkpoints, began = MemoryCheckpoints(timeout_seconds=3.0), time.monotonic()
    state = {"w": torch.ones(10)}
    checkpoints.take(1, state)
    try:
        checkpoints.take(2, state)
    except (CheckpointError, OSError) as error:
        return type(error), str(error), time.monotonic() - began
    return None


@pytest.mark.parametrize("action", ["hang", "kill"])
def test_a_rank_that_does_not_answer(start_ranks, action):
    table = json.dumps([{"phase": "replica.write", "rank": 1, "step": 2, "action": action}])
    ranks = start_ranks(take_after_trouble, 2, environment={faults.VARIABLE: table})
    kind, message, seconds = ranks.result_of(0)
    assert kind is RankSilent and "got no answer" in message and seconds < 30


def takes_with_failures(rank, world_size):
    """Takes of states that fail on one rank, or differ from the last one on one rank; then a good one."""
    mesh = init_device_mesh("cpu", (world_size,))
    checkpoints, heard = MemoryCheckpoints(), []
    for step, extra in enumerate([{}, {"rate": 0.1}, {}, {"only": torch.ones(2)}, {}]):
        state = shard(full_state(step), mesh) | (extra if rank == 1 else {})
        try:
            replica = checkpoints.take(step, state)
            heard.append({name: content.tobytes() for name, content in (replica.shard | replica.small).items()})
        except TypeError as error:
            heard.append(f"{error} {error.__notes__[0]}")
    return heard


def test_a_failure_on_one_rank_is_raised_on_all_and_later_takes_work(run_ranks):
    first, second = run_ranks(takes_with_failures, 2)
    assert first[1] == second[1] == "state rate is a float, but may hold tensors only on rank 1"
    for step in (2, 4):
        small = {name: first[step][name] for name in SMALL}
        answers = run_ranks(load, 2, step=step, files=[first[step], small | second[step]])
        for whole, *_ in answers:
            assert_whole(whole, step)
