"""Ranks that save without pause are killed at random instants: every committed checkpoint is complete.

With one section, and with two that have ranks of their own.
"""

import os
import random
import time

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from rlinf_lite.checkpoint import Checkpointer, Retention, layout, manifest, select
from rlinf_lite.checkpoint.formats.read_state import read_tensors

SEED = int(os.environ.get("RLINF_LITE_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
"""Of the instants and victims; printed when a case fails."""


def full_state(section, step):
    """Everything in it follows from the step."""
    generator = torch.Generator().manual_seed(step + len(section))
    return {"model": {"w": torch.randn(1001, 500, generator=generator)}, "optim": {"step": torch.tensor(float(step))}}


def save_for_ever(rank, world_size, root, sections):
    """One checkpoint after the other, from the newest on, as a run does that was started again.

    Args:
        sections: of each rank.
    """
    if rank == 0:
        layout.sweep(root)
    newest = layout.committed(root)
    step = layout.step_of(newest[0]) if newest else 0
    section = sections[rank]
    ranks_of = {name: [r for r in range(world_size) if sections[r] == name] for name in ("actor", "critic")}
    meshes = {name: DeviceMesh("cpu", ranks) for name, ranks in ranks_of.items() if ranks}
    checkpointer = Checkpointer(root, keep=Retention(keep_last=3), timeout_seconds=20, section=section)
    while True:
        step += 1
        whole = full_state(section, step)
        weight = distribute_tensor(whole["model"]["w"], meshes[section], [Shard(0)])
        sharded = {"model": {"w": weight}, "optim": whole["optim"]}
        checkpointer.start(step, sharded, data={"step": step})


def newest_step(root):
    return max((layout.step_of(path) for path in layout.committed(root)), default=0)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(["actor", "actor"], id="actor", marks=pytest.mark.soak),
        pytest.param(["actor", "actor", "critic"], id="and critic"),
    ],
)
@pytest.mark.parametrize("num_kills", [6, pytest.param(120, marks=pytest.mark.soak)])
def test_no_incomplete_save_is_ever_taken_for_a_checkpoint(start_ranks, tmp_path, num_kills, sections):
    chance, num_leftovers = random.Random(SEED), 0
    for kill in range(num_kills):
        before = newest_step(tmp_path)
        ranks = start_ranks(save_for_ever, len(sections), root=tmp_path, sections=sections)
        deadline = time.monotonic() + 60
        while newest_step(tmp_path) == before:
            assert time.monotonic() < deadline, "the ranks do not save"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        last = len(sections) - 1
        for victim in chance.choice([[0], [last], [0, last], [last, 0]]):
            ranks.processes[victim].kill()
            time.sleep(chance.choice([0, 0.05]))
        ranks.stop()
        num_leftovers += len(layout.leftovers(tmp_path))
        check(tmp_path, set(sections), f"kill {kill} of RLINF_LITE_TEST_SEED={SEED}")
    print(f"{num_kills} kills left {num_leftovers} incomplete saves, 0 accepted; seed {SEED}")


def check(root, sections, case):
    """Everything committed verifies, and the newest holds what its step says."""
    assert layout.committed(root), case
    for path in layout.committed(root):
        manifest.verify(path, manifest.read(path), "full")
    chosen = select("auto", root, verify="full")
    assert not chosen.skipped and chosen.path == layout.committed(root)[0], case
    assert chosen.manifest.ranks_of().keys() == sections, case
    for section in sections:
        expected, loaded = full_state(section, chosen.manifest.step), read_tensors(chosen.path / section)
        assert torch.equal(loaded["model.w"], expected["model"]["w"]), case
        assert torch.equal(loaded["optim.step"], expected["optim"]["step"]), case
    assert chosen.data == {"step": chosen.manifest.step}, case
