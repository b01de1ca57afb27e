"""Rows from several ranks are joined to whole tensors, in any order of arrival."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.weights.pieces import buckets, join_rows

WEIGHTS = {"a": torch.arange(15.0).reshape(5, 3), "b": torch.tensor(7.0), "c": torch.arange(4)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


def rows(rank: int, size: int):
    """What rank ``rank`` of ``size`` has; rank 0 has the scalar, and the first ranks have the rows if there are few."""
    for name, tensor in WEIGHTS.items():
        if not tensor.dim():
            if rank == 0:
                yield name, 0, tensor.reshape(1)
            continue
        per_rank = -(-tensor.shape[0] // size)
        part = tensor[rank * per_rank : (rank + 1) * per_rank]
        if part.numel():
            yield name, rank * per_rank, part


@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 0], [2, 0, 1], [3, 1, 2, 0]])
def test_rows_of_every_rank_make_whole_tensors(ranks):
    made = dict(join_rows((piece for rank in ranks for piece in rows(rank, len(ranks))), SHAPES))
    assert made.keys() == WEIGHTS.keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items())


def test_what_comes_whole_is_not_copied():
    made = dict(join_rows(rows(0, 1), SHAPES))
    assert made["a"].data_ptr() == WEIGHTS["a"].data_ptr()


def test_each_is_passed_on_before_the_next_is_asked_for():
    """A broadcast holds one tensor at a time."""
    asked = []

    def pieces():
        for piece in rows(0, 1):
            asked.append(piece[0])
            yield piece

    for name, _ in join_rows(pieces(), SHAPES):
        assert asked[-1] == name


def test_missing_rows_are_an_error():
    with pytest.raises(ValueError, match="rows are missing of 2 weights, for example a"):
        list(join_rows(rows(0, 2), SHAPES))


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="elsewhere"):
        list(join_rows([("elsewhere", 0, torch.zeros(2))], SHAPES))


def test_buckets_hold_everything_in_order():
    named = [(str(i), torch.zeros(10, dtype=torch.float32)) for i in range(7)]
    cut = list(buckets(iter(named), num_bytes=80))
    assert [len(bucket) for bucket in cut] == [2, 2, 2, 1]
    assert [name for bucket in cut for name, _ in bucket] == [name for name, _ in named]
    assert list(buckets([])) == []
