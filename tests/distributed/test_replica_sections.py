"""Replicas of two sections: the files of a checkpoint, for the same and for other numbers of ranks of each section."""

import random

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, CheckpointError, MemoryCheckpoints, flatten

TWO_AND_ONE, ONE_AND_TWO = {"actor": 2, "critic": 1}, {"actor": 1, "critic": 2}
SMALL = ["actor/.metadata", "critic/.metadata", "data/data.pt", "manifest.json"]
GROWN = 5
"""From this step on the critic has one tensor more."""


def full_state(section, step):
    """What the ranks of a section hold together. The replicated step counter is in one rank's shard only."""
    generator = torch.Generator().manual_seed(step + len(section))
    rows = {"actor": 7, "critic": 5}[section]
    state = {"model": {"w": torch.randn(rows, 3, generator=generator)}, "optim": {"step": torch.tensor(float(step))}}
    if section == "critic" and step >= GROWN:
        state["model"]["more"] = torch.randn(rows, generator=generator)
    return state


def join(rank, counts):
    """This rank's section, and the mesh of its ranks."""
    first, mine = 0, None
    for section, count in counts.items():
        ranks = range(first, first + count)
        mesh = DeviceMesh("cpu", [*ranks])  # made on all ranks
        if rank in ranks:
            mine = section, mesh
        first += count
    return mine


def shard(value, mesh):
    if isinstance(value, dict):
        return {name: shard(part, mesh) for name, part in value.items()}
    return distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value.clone()


def draw():
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]


def seed_with(seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def take(rank, world_size, root, steps):
    """Each step's replica as bytes, and what is drawn after it; the last step is saved to disk too."""
    section, mesh = join(rank, TWO_AND_ONE)
    seed_with(rank)
    checkpoints, taken = MemoryCheckpoints(seed=7, section=section), []
    for step in steps:
        state = shard(full_state(section, step), mesh)
        replica = checkpoints.take(step, state, data={"step": step}, info={"run": "x"})
        if step == steps[-1]:
            Checkpointer(root, section=section).save(step, state, data={"step": step}, info={"run": "x"})
        small, own = ({n: c.tobytes() for n, c in part.items()} for part in (replica.small, replica.shard))
        taken.append((small, own, draw()))
    return taken


def load_each(rank, world_size, counts, cases):
    """What becomes of each case, a step and the files of each rank: section, whole state and draws, or the error."""
    section, mesh = join(rank, counts)
    checkpoints, heard = MemoryCheckpoints(seed=7, section=section), []
    for step, files in cases:
        seed_with(100)
        state = shard(full_state(section, step), mesh)
        for tensor in flatten(state).values():
            tensor.fill_(-1)
        given = {name: np.frombuffer(content, np.uint8) for name, content in files[rank].items()}
        try:
            report = checkpoints.load(step, given, state)
        except CheckpointError as error:
            heard.append((type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])])))
            continue
        drawn = draw()
        whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in flatten(state).items()}
        heard.append((section, whole, report.rng_restored, drawn))
    return heard


def assert_whole(section, loaded, step):
    expected = flatten(full_state(section, step))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def shared():
    """Filled by the first test that asks: the replicas, and where the last one was saved."""
    return {}


@pytest.fixture
def taken(shared, run_ranks, tmp_path_factory):
    """Replicas of three steps: planned, as the last, and with another critic. By step: small files, shards, draws."""
    if not shared:
        root, steps = tmp_path_factory.mktemp("saved"), [3, 4, 5]
        by_rank = run_ranks(take, 3, root=root, steps=steps)
        shared["root"] = root
        shared["steps"] = {step: [of_rank[i] for of_rank in by_rank] for i, step in enumerate(steps)}
    return shared["steps"]


def parts(taken, step):
    return taken[step][0][0], [own for _, own, _ in taken[step]]


def test_the_files_are_those_of_a_checkpoint(taken, shared):
    small, shards = parts(taken, 5)
    assert sorted(small) == SMALL and taken[5][1][0] == taken[5][2][0] == {}
    assert [list(own) for own in shards] == [
        [f"{name}.distcp"] for name in ("actor/__0_0", "actor/__1_0", "critic/__0_0")
    ]
    path = shared["root"] / "global_step_5"
    held = {name: content for part in (small, *shards) for name, content in part.items()}
    saved = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert held == saved


def test_the_same_ranks_get_all_back_in_new_processes(taken, run_ranks):
    cases = []
    for step in taken:
        small, shards = parts(taken, step)
        every = {name: content for own in shards for name, content in own.items()}
        cases += [(step, [small | own for own in shards]), (step, [small | every] * 3)]
    for rank, heard in enumerate(run_ranks(load_each, 3, counts=TWO_AND_ONE, cases=cases)):
        for (step, _), (section, loaded, restored, drawn) in zip(cases, heard, strict=True):
            assert section == ("critic" if rank == 2 else "actor")
            assert_whole(section, loaded, step)
            assert restored and drawn == taken[step][rank][2]


@pytest.mark.parametrize("counts", [ONE_AND_TWO, {"actor": 3, "critic": 1}], ids=["1+2", "3+1"])
def test_other_numbers_of_ranks(taken, run_ranks, counts):
    """Given all shards; or only those of its section whose number modulo the section's ranks is its place."""
    small, (first, second, critic) = parts(taken, 5)
    least = {
        3: [small | first | second, small | critic, small],
        4: [small | first, small | second, small, small | critic],
    }
    size = sum(counts.values())
    cases = [(5, [small | first | second | critic] * size), (5, least[size])]
    heard = run_ranks(load_each, size, counts=counts, cases=cases)
    for rank, of_rank in enumerate(heard):
        for section, loaded, restored, drawn in of_rank:
            assert section == ("actor" if rank < counts["actor"] else "critic")
            assert_whole(section, loaded, 5)
            assert not restored and drawn == of_rank[0][3]
    assert len({tuple(of_rank[0][3]) for of_rank in heard}) == size


def test_damage_in_either_section_is_heard_by_all(taken, run_ranks):
    small, shards = parts(taken, 5)
    whole = [small | own for own in shards]
    flipped = {
        name: bytes([*content[:-9], content[-9] ^ 4, *content[-8:]]) for own in whole for name, content in own.items()
    }
    cases = [
        (5, [{**files, name: flipped[name]} if other == rank else files for other, files in enumerate(whole)])
        for rank, files in enumerate(whole)
        for name in files
    ]
    cases.append((5, [whole[0], whole[1], small]))
    by_case = [*zip(*run_ranks(load_each, 3, counts=TWO_AND_ONE, cases=[*cases, (5, whole)]), strict=True)]
    assert len(by_case) == 3 * 5 + 2
    for heard in by_case[:-1]:
        assert len(set(heard)) == 1 and heard[0][0] in ("DamagedCheckpoint", "UnsafeCheckpoint")
        assert "(memory)/global_step_5" in heard[0][1] and " on rank " in heard[0][1]
    assert "critic/__0_0.distcp is missing from the files that rank 2 was given" in by_case[-2][0][1]
    for section, loaded, *_ in by_case[-1]:
        assert_whole(section, loaded, 5)


def test_ranks_that_have_no_critic_refuse_it(taken, run_ranks):
    small, shards = parts(taken, 4)
    for ((kind, text),) in run_ranks(load_each, 2, counts={"actor": 2}, cases=[(4, [small | own for own in shards])]):
        assert kind == "SectionMismatch" and "(memory)/global_step_4: has a section critic/" in text
