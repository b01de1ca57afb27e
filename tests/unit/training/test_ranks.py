"""Units to ranks: each once, whatever the number of ranks, and units of similar size at the same time."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.training.ranks import shard, shard_mini_batch, slots
from rlinf_lite.types import MiniBatch, Normalizers, Segments, TokenBatch

SIZES = 3, 9, 4, 9, 1, 8, 2


def unit(index: int, size: int) -> TokenBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        index=index,
        ids_N=torch.zeros(size, dtype=torch.int64),
        positions_N=torch.arange(size),
        segments=Segments(start_S=nothing, stop_S=nothing, parent_S=nothing),
        source_M=nothing,
        targets_M=nothing,
        seq_M=nothing,
        num_responses=0,
        columns={},
    )


UNITS = tuple(unit(index, size) for index, size in enumerate(SIZES))
LARGEST_FIRST = [1, 3, 5, 2, 0, 6, 4]


def indices(units) -> list[int | None]:
    return [None if unit is None else unit.index for unit in units]


def test_forward_passes():
    assert [indices(of_rank) for of_rank in shard(UNITS, 1)] == [LARGEST_FIRST]
    assert [indices(of_rank) for of_rank in shard(UNITS, 3)] == [[1, 2, 4], [3, 0, None], [5, 6, None]]
    assert shard([], 2) == [(), ()]


def test_slots():
    assert [indices(slot) for slot in slots(UNITS, 5040)] == [[index] for index in LARGEST_FIRST]
    assert [indices(slot) for slot in slots(UNITS, 3)] == [[1, 2, 4], [3, 0], [5, 6]]
    assert slots((), 3) == []


@pytest.mark.parametrize("virtual_ranks", [1, 2, 3, 5040])
def test_any_number_of_ranks_adds_the_same_slots_in_the_same_order(virtual_ranks):
    wanted = [indices(slot) for slot in slots(UNITS, virtual_ranks)]
    norm = Normalizers(num_tokens=1, num_sequences=1)
    for num_ranks in (1, 2, 3, 4, 9):
        ranks = shard_mini_batch(MiniBatch(units=UNITS, norm=norm), num_ranks, virtual_ranks=virtual_ranks)
        added = []
        for rounds in zip(*(rank.rounds for rank in ranks), strict=True):
            assert len({(len(current.units), current.num_slots) for current in rounds}) == 1, "ranks step together"
            of_ranks = [[index for index in indices(current.units) if index is not None] for current in rounds]
            assert all(not units for units in of_ranks[rounds[0].num_slots :])
            added += of_ranks[: rounds[0].num_slots]
        assert added == wanted
