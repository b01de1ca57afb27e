"""Several ranks save and load together: each rank's state, other numbers of ranks, and errors on single ranks."""

import json
import random
import re

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, flatten, layout, manifest, select, state_digest
from rlinf_lite.checkpoint.formats.read_state import read_tensors

ROWS = 7
"""Not a multiple of 2 or 3: shards differ in size, and with 4 ranks and one row some are empty."""


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
    """Tensors with rows are sharded, scalars are kept by every rank."""
    if isinstance(value, dict):
        return {name: shard(part, mesh) for name, part in value.items()}
    return distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value.clone()


def draw():
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.rand(()).item()]


def save_all(rank, world_size, root, step):
    """Save a sharded state and an RNG state per rank; returns random numbers drawn after the save."""
    mesh = init_device_mesh("cpu", (world_size,))
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    draw()
    report = Checkpointer(root, seed=7).save(step, shard(full_state(step), mesh), data={"step": step}, info={})
    return draw(), report.num_bytes


def load_all(rank, world_size, path):
    """Load into another state and RNG state; returns the whole loaded state and random numbers drawn after it."""
    mesh = init_device_mesh("cpu", (world_size,))
    random.seed(100), np.random.seed(100), torch.manual_seed(100)
    state = shard(full_state(-1), mesh)
    report = Checkpointer(path.parent, seed=7).load(path, state)
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in flatten(state).items()}
    return whole, report.rng_restored, draw(), state_digest(flatten(state))


def assert_whole(loaded, step):
    expected = flatten(full_state(step))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_each_rank_gets_its_own_generators_back_in_new_processes(run_ranks, tmp_path):
    saved = run_ranks(save_all, 2, root=tmp_path, step=3)
    loaded = run_ranks(load_all, 2, path=tmp_path / "global_step_3")
    assert [drawn for drawn, _ in saved] == [drawn for _, _, drawn, _ in loaded]
    assert saved[0][0] != saved[1][0]
    assert all(restored for _, restored, _, _ in loaded)
    for whole, *_ in loaded:
        assert_whole(whole, 3)


def load_and_save(rank, world_size, path, root):
    """What `load_all` returns; saved again by these ranks."""
    answer = load_all(rank, world_size, path)
    save_all(rank, world_size, root, 3)
    return answer


def test_from_two_ranks_to_one_to_three_to_four(run_ranks, tmp_path):
    """Each loads the previous checkpoint: weights and optimizer state are equal, the RNG state is derived anew."""
    saved = run_ranks(save_all, 2, root=tmp_path, step=3)
    path = tmp_path / "global_step_3"
    assert manifest.read(path).world_size == 2
    assert {num_bytes for _, num_bytes in saved} == {sum(r.size for r in manifest.read(path).files.values())}
    drawn = {}
    for world_size in (1, 3, 4):
        answers = run_ranks(load_and_save, world_size, path=path, root=tmp_path / str(world_size))
        assert len({digest for *_, digest in answers}) == 1
        assert not any(restored for _, restored, _, _ in answers)
        for whole, *_ in answers:
            assert_whole(whole, 3)
        drawn[world_size] = [tuple(numbers) for _, _, numbers, _ in answers]
        path = tmp_path / str(world_size) / "global_step_3"
    assert drawn[4][:3] == drawn[3]
    assert drawn[3][:1] == drawn[1]
    assert len(set(drawn[4])) == 4


def test_one_process_without_a_group_reads_what_ranks_wrote(run_ranks, tmp_path):
    run_ranks(save_all, 3, root=tmp_path, step=3)
    path = tmp_path / "global_step_3"
    assert sorted(file.name for file in (path / "actor").iterdir())[1:] == [f"__{rank}_0.distcp" for rank in range(3)]
    assert_whole(read_tensors(path / "actor", lambda name: not name.startswith("rng.")), 3)
    state = full_state(-1)
    assert not Checkpointer(tmp_path, seed=7).load(path, state).rng_restored
    assert_whole(flatten(state), 3)


def train(rank, world_size, root, resume_from):
    """Four steps of a fully sharded model, or two steps, or the last two from a checkpoint."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for param in model.parameters():
        zeros = {name: torch.zeros_like(param.detach()) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
    moments = {name: optimizer.state[param] for name, param in model.named_parameters()}
    state = {"model": model, "optim": moments}
    torch.manual_seed(rank)
    checkpointer = Checkpointer(root, seed=7)
    if resume_from is not None:
        checkpointer.load(resume_from, state)
    for step in range(3, 5) if resume_from else range(1, 5):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save(step, state, data={"step": step}, info={})
    return state_digest(flatten(state))


def test_a_fully_sharded_model_trains_on_to_the_same_bits(run_ranks, tmp_path):
    straight = run_ranks(train, 2, root=tmp_path / "straight", resume_from=None)
    resumed = run_ranks(train, 2, root=tmp_path / "resumed", resume_from=tmp_path / "straight" / "global_step_2")
    assert straight == resumed
    for name in ("actor/__0_0.distcp", "actor/__1_0.distcp"):
        of_step_4 = [manifest.read(tmp_path / run / "global_step_4").files[name] for run in ("straight", "resumed")]
        assert of_step_4[0] == of_step_4[1], "RNG state included"


class Raises:
    """State that fails on one rank, with an error that cannot be sent to the others."""

    def state_dict(self):
        class Local(Exception):
            pass

        raise Local("why")

    def load_state_dict(self, state_dict):
        raise NotImplementedError


def failing_saves(rank, world_size, root):
    """Faults on steps 11, 12 and 14 and bad states on one rank: all ranks raise the error, and later saves work."""
    mesh = init_device_mesh("cpu", (world_size,))
    checkpointer = Checkpointer(root, seed=7)
    heard = {}

    def attempt(step, **extra):
        state = shard(full_state(step), mesh) | extra
        try:
            checkpointer.save(step, state, data={"step": step}, info={})
        except Exception as error:
            heard[step] = (type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])]))

    attempt(10)
    attempt(11)
    attempt(12)
    attempt(13)
    attempt(14)
    attempt(15, **({"rate": 0.1} if rank == 1 else {}))
    attempt(16, **({"bad": Raises()} if rank == 1 else {}))
    attempt(17)
    return heard


def failing_loads(rank, world_size, path):
    """States that fit on one rank only: every rank hears what was missing, and the next load works."""
    mesh = init_device_mesh("cpu", (world_size,))
    checkpointer = Checkpointer(path.parent, seed=7)
    state = shard(full_state(-1), mesh)
    heard = []
    for extra in ({"more": torch.zeros(2)}, {"bad": Raises()}):
        try:
            checkpointer.load(path, state | (extra if rank == 1 else {}))
        except Exception as error:
            heard.append((type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])])))
    checkpointer.load(path, state)
    return heard


def test_a_failure_on_one_rank_is_heard_by_all_and_leaves_nothing(run_ranks, tmp_path):
    faults = [
        {"phase": "save.write", "rank": 1, "step": 11, "action": "ENOSPC"},
        {"phase": "save.write", "rank": 0, "step": 12, "action": "EIO"},
        {"phase": "save.manifest", "step": 14, "action": "EACCES"},
    ]
    heard = run_ranks(failing_saves, 2, root=tmp_path, environment={"RLINF_LITE_FAULTS": json.dumps(faults)})
    assert heard[0] == heard[1]
    assert sorted(heard[0]) == [11, 12, 14, 15, 16]
    disk_full = rf"{tmp_path}/global_step_11 was not saved: No space left on device \(.*__1_0\.distcp\) on rank 1"
    expected = {
        11: ("SaveError", disk_full),
        12: ("SaveError", r"global_step_12 was not saved: Input/output error \(.*__0_0\.distcp\) on rank 0"),
        14: ("SaveError", r"global_step_14 was not saved: Permission denied .* on rank 0"),
        15: ("TypeError", "state rate is a float, but may hold tensors only on rank 1"),
        16: ("RuntimeError", "Local: why on rank 1"),
    }
    for step, (kind, text) in expected.items():
        assert heard[0][step][0] == kind
        assert re.search(text, heard[0][step][1]), heard[0][step][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_10", "global_step_13", "global_step_17"]
    for path in layout.committed(tmp_path):
        manifest.read_verified(path, "full")

    heard = run_ranks(failing_loads, 2, path=tmp_path / "global_step_17")
    assert heard[0] == heard[1]
    assert [kind for kind, _ in heard[0]] == ["StateMismatch", "RuntimeError"]
    assert re.search("missing: more on rank 1", heard[0][0][1])
    assert re.search("Local: why on rank 1", heard[0][1][1])


KILLS = [(1, "save.write"), (0, "save.write"), (0, "save.manifest"), (0, "save.rename")]


def save_both(rank, world_size, root, steps):
    for step in steps:
        save_all(rank, world_size, root, step)


@pytest.mark.parametrize("killed, phase", KILLS)
def test_a_rank_killed_in_the_middle_of_a_save(start_ranks, run_ranks, tmp_path, killed, phase):
    fault = {"phase": phase, "step": 8, "action": "kill", "rank": killed}
    environment = {"RLINF_LITE_FAULTS": json.dumps([fault])}
    ranks = start_ranks(save_both, 2, root=tmp_path, steps=[4, 8], environment=environment)
    ranks.processes[killed].join(60)
    assert ranks.processes[killed].exitcode == -9
    ranks.stop()
    assert select("auto", tmp_path, verify="full").manifest.step == 4
    assert len(layout.sweep(tmp_path)) <= 1  # none if the survivor has noticed and cleaned up
    run_ranks(save_both, 2, root=tmp_path, steps=[8])
    assert select("auto", tmp_path, verify="full").manifest.step == 8
