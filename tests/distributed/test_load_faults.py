"""Faults in each phase of a load, on one rank: all ranks raise, none waits for ever, the checkpoint is untouched."""

import time

import pytest
import torch

from rlinf_lite import faults
from rlinf_lite.checkpoint import Checkpointer, CheckpointError, DamagedCheckpoint, RankSilent, manifest


def make_state(rank):
    return {"model": {f"of rank {r}": torch.full((1000,), float(r)) for r in range(2)}}


def save(rank, world_size, root):
    return Checkpointer(root).save(5, make_state(rank)).path


def load(rank, world_size, path):
    """How the load ended on this rank, and after how many seconds."""
    checkpointer, began = Checkpointer(path.parent, timeout_seconds=3.0), time.monotonic()
    try:
        checkpointer.load(path, make_state(rank))
    except CheckpointError as error:
        return type(error), " ".join([str(error), *getattr(error, "__notes__", ())]), time.monotonic() - began
    return None, "", time.monotonic() - began


@pytest.mark.parametrize("error", ["EIO", "EACCES"])
@pytest.mark.parametrize("phase, rank", [("load.manifest", 0), ("load.read", 0), ("load.read", 1)])
def test_an_error_of_the_storage(run_ranks, tmp_path, phase, rank, error):
    path = run_ranks(save, 2, root=tmp_path)[0]
    table = f'[{{"phase": "{phase}", "rank": {rank}, "action": "{error}"}}]'
    for kind, message, _ in run_ranks(load, 2, path=path, environment={faults.VARIABLE: table}):
        assert kind is DamagedCheckpoint
        assert str(path) in message and f"on rank {rank}" in message
    manifest.verify(path, manifest.read(path), "full")
    assert [kind for kind, *_ in run_ranks(load, 2, path=path)] == [None, None]


def test_a_rank_that_hangs(start_ranks, run_ranks, tmp_path):
    path = run_ranks(save, 2, root=tmp_path)[0]
    table = '[{"phase": "load.read", "rank": 1, "action": "hang"}]'
    ranks = start_ranks(load, 2, path=path, environment={faults.VARIABLE: table})
    kind, message, seconds = ranks.result_of(0)
    assert kind is RankSilent and "Ranks 1" in message and seconds < 30


def test_a_rank_that_is_killed(start_ranks, run_ranks, tmp_path):
    path = run_ranks(save, 2, root=tmp_path)[0]
    table = '[{"phase": "load.read", "rank": 1, "action": "kill"}]'
    ranks = start_ranks(load, 2, path=path, environment={faults.VARIABLE: table})
    kind, _, seconds = ranks.result_of(0)
    assert kind is RankSilent and seconds < 30
    assert [kind for kind, *_ in run_ranks(load, 2, path=path)] == [None, None]
