"""Replicas of a single rank: the same files in memory as a checkpoint has on disk, and verified like them."""

import gc
import os
import pickle
import random
import resource
import weakref

import numpy as np
import pytest
import torch

from rlinf_lite.checkpoint import (
    Checkpointer,
    DamagedCheckpoint,
    MemoryCheckpoints,
    NoCheckpoint,
    StateMismatch,
    flatten,
    manifest,
    read_data,
)
from rlinf_lite.checkpoint.memory.replica import read_small

SHARD, METADATA, DATA, MANIFEST = "actor/__0_0.distcp", "actor/.metadata", "data/data.pt", "manifest.json"
PROGRESS = {"progress": {"step": 5}}


def files_of(replica):
    return {**replica.shard, **replica.small}


def through_an_object_store(replica):
    """A copy as another process gets it: arrays out of band, read-only."""
    buffers = []
    content = pickle.dumps(replica, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(content, buffers=[bytes(buffer) for buffer in buffers]), len(content)


def assert_equal(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


@pytest.fixture
def taken(make_state):
    """Read-only files of a replica of `make_state(5)`."""
    replica = MemoryCheckpoints(seed=7).take(5, make_state(5), data=PROGRESS, info={"run": "x"})
    return files_of(through_an_object_store(replica)[0])


def test_state_and_generators_come_back_from_read_only_arrays(make_state):
    replica = MemoryCheckpoints(seed=7).take(5, make_state(5), data=PROGRESS)
    drawn = random.random(), np.random.random(), torch.rand(()).item()
    copy, num_pickled = through_an_object_store(replica)
    assert num_pickled < 1000, "arrays should travel out of band"
    assert not any(array.flags.writeable for array in files_of(copy).values())
    state = make_state(6)
    report = MemoryCheckpoints(seed=7).load(5, files_of(copy), state)
    assert_equal(state, make_state(5))
    assert (random.random(), np.random.random(), torch.rand(()).item()) == drawn
    assert report.rng_restored and report.manifest.step == 5
    assert str(report.path) == "(memory)/global_step_5"
    assert pickle.loads(pickle.dumps(report)) == report


def test_the_files_are_those_of_a_checkpoint_on_disk(root, make_state):
    state = {
        **make_state(5),
        "large": torch.randn(1100, 1000),
        "rows": torch.randn(8, 6)[2:5],
        "t": torch.ones(3, 2).t(),
    }
    path = Checkpointer(root).save(5, state, data=PROGRESS, info={"run": "x"}).path
    for _ in range(2):  # planned, and as the last time
        checkpoints = MemoryCheckpoints()
        files = files_of(checkpoints.take(5, state, data=PROGRESS, info={"run": "x"}))
        assert files.keys() == {SHARD, METADATA, DATA, MANIFEST}
        for name, content in files.items():
            assert content.tobytes() == (path / name).read_bytes(), name


def test_replicas_written_out_are_a_checkpoint(root, taken, make_state):
    path = root / "global_step_5"
    for name, content in taken.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.tobytes())
    state = make_state(6)
    Checkpointer(root).load(path, state)
    assert_equal(state, make_state(5))
    assert read_data(path) == PROGRESS


def test_a_replica_is_of_the_time_it_was_taken(make_state):
    state = make_state(5)
    replica = MemoryCheckpoints().take(5, state)
    for tensor in flatten(state).values():
        tensor.zero_()
    MemoryCheckpoints().load(5, files_of(replica), state)
    assert_equal(state, make_state(5))


def test_states_of_another_form_one_after_the_other(make_state):
    checkpoints = MemoryCheckpoints()
    for step, extra in enumerate([{}, {"more": torch.ones(3)}, {"more": torch.ones(4)}, {}]):
        files = files_of(checkpoints.take(step, make_state(step) | extra))
        state = make_state(9) | {name: torch.zeros_like(tensor) for name, tensor in extra.items()}
        checkpoints.load(step, files, state)
        assert_equal(state, make_state(step) | extra)


def test_a_state_that_cannot_be_saved_is_refused_and_the_next_is_taken(make_state):
    checkpoints = MemoryCheckpoints()
    with pytest.raises(TypeError, match="state rate is a float"):
        checkpoints.take(5, make_state(5) | {"rate": 0.1})
    with pytest.raises(TypeError, match="plain values and tensors only"):
        checkpoints.take(5, make_state(5), data={"path": np.float64(1)})
    state = make_state(0)
    checkpoints.load(5, files_of(checkpoints.take(5, make_state(5))), state)
    assert_equal(state, make_state(5))


@pytest.mark.parametrize("name", [SHARD, METADATA, DATA, MANIFEST])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_in_any_file_is_noticed(taken, make_state, name, place):
    damaged = taken[name].copy()
    damaged[int(place * len(damaged))] ^= 4
    with pytest.raises(DamagedCheckpoint):
        MemoryCheckpoints().load(5, {**taken, name: damaged}, make_state(6))
    if name in (DATA, MANIFEST):
        with pytest.raises(DamagedCheckpoint):
            read_small(5, {**taken, name: damaged})


@pytest.mark.parametrize("name", [SHARD, METADATA, DATA])
def test_what_is_missing_is_named(taken, make_state, name):
    files = {other: content for other, content in taken.items() if other != name}
    with pytest.raises(
        DamagedCheckpoint, match=f"global_step_5: {name} is missing from the files that rank 0 was given"
    ):
        MemoryCheckpoints().load(5, files, make_state(6))


def test_files_that_do_not_belong_together(taken, make_state):
    checkpoints, state = MemoryCheckpoints(), make_state(6)
    with pytest.raises(NoCheckpoint, match=r"global_step_5: no manifest\.json"):
        checkpoints.load(5, {SHARD: taken[SHARD]}, state)
    with pytest.raises(DamagedCheckpoint, match="the directory says step 6, its manifest says 5"):
        checkpoints.load(6, taken, state)
    with pytest.raises(DamagedCheckpoint, match=r"__1_0\.distcp is not in the manifest"):
        checkpoints.load(5, {**taken, "actor/__1_0.distcp": taken[SHARD]}, state)
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: [0-9]+ bytes, the manifest says [0-9]+"):
        checkpoints.load(5, {**taken, SHARD: taken[SHARD][:-1]}, state)
    later = MemoryCheckpoints().take(8, make_state(8))
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: its blake3 is not the one in the manifest"):
        checkpoints.load(5, {**taken, **later.shard}, state)
    with pytest.raises(StateMismatch, match="missing: more"):
        checkpoints.load(5, taken, state | {"more": torch.zeros(1)})
    checkpoints.load(5, taken, state)
    assert_equal(state, make_state(5))


def test_manifest_and_data_are_read_without_shards(taken):
    small = {name: taken[name] for name in (MANIFEST, DATA)}
    held, data = read_small(5, small)
    assert (held.step, held.world_size, held.info, data) == (5, 1, {"run": "x"}, PROGRESS)
    assert isinstance(held, manifest.Manifest)


def test_arrays_are_let_go_of(make_state):
    """By who has taken them, and by who has loaded them."""
    checkpoints = MemoryCheckpoints()
    replica = checkpoints.take(5, make_state(5))
    files = {name: content.copy() for name, content in files_of(replica).items()}
    gone = [weakref.ref(array) for array in (*files_of(replica).values(), *files.values())]
    report = checkpoints.load(5, files, make_state(6))
    del replica
    files.clear()
    assert report.manifest.step == 5
    assert [ref() for ref in gone] == [None] * len(gone)


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_is_flat_after_many_takes():
    checkpoints, state = MemoryCheckpoints(), {f"w{i}": torch.randn(250_000) for i in range(4)}
    replica = checkpoints.take(0, state)
    for step in range(1, 5):
        replica = checkpoints.take(step, state)
    before = resident_bytes()
    for step in range(50):
        replica = checkpoints.take(step, state)
    assert replica.shard[SHARD].nbytes > 4e6
    assert resident_bytes() - before < 8e6, "50 replicas are 200 MB"
