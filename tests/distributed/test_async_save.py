"""Saves in the background during training: their content, the fence, and what happens when they fail."""

import random
import resource
import shutil
import statistics
import time

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlinf_lite import faults
from rlinf_lite.checkpoint import Checkpointer, RankSilent, SaveError, flatten, layout, manifest, select

WIDTH = 64


class Training:
    """A sharded model with AdamW, whose optimizer waits for the save before it steps."""

    def __init__(self, rank, world_size, root, width=WIDTH, **options):
        torch.manual_seed(1)
        mesh = init_device_mesh("cpu", (world_size,))
        self.model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width + 1))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.checkpointer = Checkpointer(root, seed=7, **options)
        self.optimizer.register_step_pre_hook(lambda *_: self.checkpointer.fence())
        self.width, self.rank = width, rank
        self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.width)).square().mean().backward()
        self.optimizer.step()

    def state(self):
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            "model": dict(self.model.state_dict()),
            "optim": {names[parameter]: dict(values) for parameter, values in self.optimizer.state.items()},
        }

    def copy(self):
        return {name: tensor.clone() for name, tensor in flatten(self.state()).items()}


def same(first, second):
    return all(torch.equal(local(first[name]), local(second[name])) for name in first.keys() | second.keys())


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def train_through_saves(rank, world_size, root, num_saves, seed):
    """Each step is saved twice: blocking, and in the background of the steps that follow it."""
    training = Training(rank, world_size, root / "async")
    blocking = Checkpointer(root / "sync", seed=7)
    chance = random.Random(seed)
    for step in range(1, num_saves + 1):
        state = torch.get_rng_state()
        blocking.save(step, training.state(), data={"step": step}, info={"step": step})
        torch.set_rng_state(state)
        training.checkpointer.start(step, training.state(), data={"step": step}, info={"step": step})
        torch.rand(3)  # the RNG state changes too
        for _ in range(chance.randrange(1, 4)):
            training.step()
    training.checkpointer.finish()
    return [
        (manifest.read(root / "sync" / f"global_step_{step}"), manifest.read(root / "async" / f"global_step_{step}"))
        for step in range(1, num_saves + 1)
    ]


@pytest.mark.parametrize("num_saves", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_the_content_is_that_of_the_instant_although_training_went_on(run_ranks, tmp_path, num_saves):
    """Byte for byte: every file of the one has the size and hash of the same file of the other."""
    both = run_ranks(train_through_saves, 2, root=tmp_path, num_saves=num_saves, seed=num_saves, timeout=600)[0]
    assert len(both) == num_saves
    assert all(blocking.files == background.files for blocking, background in both)
    assert len({background.files["actor/__0_0.distcp"].digest for _, background in both}) == num_saves
    for step in range(1, num_saves + 1):
        path = tmp_path / "async" / f"global_step_{step}"
        manifest.verify(path, manifest.read(path), "full")


def step_during_a_slow_save(rank, world_size, root, staged_fraction, fenced):
    """The storage takes three seconds before it takes the first byte; one training step comes meanwhile."""
    training = Training(rank, world_size, root, staged_fraction=staged_fraction)
    if not fenced:
        training.checkpointer.fence = lambda: None
    before = training.copy()
    began = time.perf_counter()
    training.checkpointer.start(1, training.state())
    training.step()
    step_seconds = time.perf_counter() - began
    in_flight = training.checkpointer.poll() is None
    report = training.checkpointer.finish()
    after = training.copy()
    training.checkpointer.load(root / "global_step_1", training.state())
    return same(before, training.copy()), same(after, training.copy()), step_seconds, in_flight, report.stall_seconds


SLOW = {faults.VARIABLE: '[{"phase": "save.write", "action": "wait"}]'}


def test_the_optimizer_waits_until_everything_is_read(run_ranks, tmp_path):
    for as_before, as_after, seconds, _, stall in run_ranks(
        step_during_a_slow_save, 2, root=tmp_path, staged_fraction=0.0, fenced=True, environment=SLOW
    ):
        assert as_before and not as_after
        assert 2.5 <= stall <= seconds


def test_the_fence_copies_the_rest_and_returns(run_ranks, tmp_path):
    for as_before, as_after, seconds, in_flight, stall in run_ranks(
        step_during_a_slow_save, 2, root=tmp_path, staged_fraction=1.0, fenced=True, environment=SLOW
    ):
        assert as_before and not as_after
        assert in_flight and stall <= seconds < 2.5


def test_without_the_fence_the_content_would_be_another(run_ranks, tmp_path):
    """What the two tests above could not notice otherwise."""
    for as_before, as_after, *_ in run_ranks(
        step_during_a_slow_save, 2, root=tmp_path, staged_fraction=0.0, fenced=False, environment=SLOW
    ):
        assert not as_before and not as_after  # what is small was copied at once


def save_over_a_hanging_rank(rank, world_size, root):
    """Rank 1's storage never answers. Returns how the save ended on each rank, and whether training continued."""
    training = Training(rank, world_size, root, timeout_seconds=3.0)
    training.checkpointer.save(1, training.state())
    began = time.perf_counter()
    training.checkpointer.start(2, training.state())
    training.step()
    step_seconds = time.perf_counter() - began
    try:
        training.checkpointer.finish()
        ending = "saved"
    except (SaveError, RankSilent) as error:
        ending = str(error)
    training.step()
    return ending, step_seconds, time.perf_counter() - began


def test_a_rank_that_hangs_holds_nobody_for_ever(run_ranks, tmp_path):
    hang = {faults.VARIABLE: '[{"phase": "save.write", "rank": 1, "step": 2, "action": "hang"}]'}
    (first, first_step, first_all), (second, second_step, second_all) = run_ranks(
        save_over_a_hanging_rank, 2, root=tmp_path, environment=hang
    )
    assert "global_step_2 was not saved: rank 0 got no answer from the others" in first and "Ranks 1" in first
    assert "global_step_2 was not saved: rank 1 hangs while writing it" in second
    assert max(first_step, second_step) < 20 and max(first_all, second_all) < 40  # of the hour that it hangs
    assert [path.name for path in layout.committed(tmp_path)] == ["global_step_1"]
    assert select("auto", tmp_path, verify="full").path == tmp_path / "global_step_1"


def fail_then_save(rank, world_size, root):
    """The disk of rank 1 is full for one save. Returns what each call said."""
    training = Training(rank, world_size, root)
    said = []
    for step in (1, 2, 3):
        training.checkpointer.start(step, training.state())
        training.step()
        try:
            said.append(training.checkpointer.finish().path.name)
        except SaveError as error:
            said.append(str(error))
    return said


FAULTS = [
    (phase, error) if error == "ENOSPC" or phase == "save.write" else pytest.param(phase, error, marks=pytest.mark.soak)
    for phase in ("save.plan", "save.write", "save.halfway", "save.written")
    for error in ("ENOSPC", "EIO", "EACCES")
]


@pytest.mark.parametrize("phase, error", FAULTS)
def test_an_error_on_one_rank_is_told_to_all_and_the_next_save_works(run_ranks, tmp_path, phase, error):
    table = f'[{{"phase": "{phase}", "rank": 1, "step": 2, "action": "{error}"}}]'
    for first, second, third in run_ranks(fail_then_save, 2, root=tmp_path, environment={faults.VARIABLE: table}):
        assert (first, third) == ("global_step_1", "global_step_3")
        assert str(tmp_path / "global_step_2") in second and "on rank 1" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step_1", "global_step_3"]


def grow(rank, world_size, root, num_saves):
    """Resident bytes of the rank after each save of the same state."""
    training = Training(rank, world_size, root, width=512)
    resident = []
    for step in range(1, num_saves + 1):
        training.checkpointer.start(step % 3, training.state())
        training.step()
        training.checkpointer.finish()
        with open("/proc/self/statm") as statm:
            resident.append(int(statm.read().split()[1]) * resource.getpagesize())
        if rank == 0:
            for old in root.glob("*superseded*"):
                shutil.rmtree(old)
    return resident


@pytest.mark.parametrize("num_saves", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_memory_does_not_grow(run_ranks, tmp_path, num_saves):
    for resident in run_ranks(grow, 2, root=tmp_path, num_saves=num_saves, timeout=900):
        tenth = num_saves // 10
        assert statistics.median(resident[-2 * tenth :]) <= 1.05 * statistics.median(resident[2 * tenth : 4 * tenth])
