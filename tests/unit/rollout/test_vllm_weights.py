"""Pieces of tensors become whole ones, in whatever order ranks bring them; needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.rollout.vllm_weights import buckets, whole

WEIGHTS = {"a": torch.arange(15.0).reshape(5, 3), "b": torch.tensor(7.0), "c": torch.arange(4)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}


def rows(rank: int, size: int):
    """What rank ``rank`` of ``size`` has; a scalar is with everybody, and too few rows are with the first ones."""
    for name, tensor in WEIGHTS.items():
        if not tensor.dim():
            if rank == 0:
                yield name, 0, tensor.reshape(1)
            continue
        share = -(-tensor.shape[0] // size)
        part = tensor[rank * share : (rank + 1) * share]
        if part.numel():
            yield name, rank * share, part


@pytest.mark.parametrize("ranks", [[0], [0, 1], [1, 0], [2, 0, 1], [3, 1, 2, 0]])
def test_rows_of_every_rank_make_whole_tensors(ranks):
    made = dict(whole((piece for rank in ranks for piece in rows(rank, len(ranks))), SHAPES))
    assert made.keys() == WEIGHTS.keys()
    assert all(torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items())


def test_what_comes_whole_is_not_copied():
    made = dict(whole(rows(0, 1), SHAPES))
    assert made["a"].data_ptr() == WEIGHTS["a"].data_ptr()


def test_each_is_passed_on_before_the_next_is_asked_for():
    """A broadcast holds one tensor at a time."""
    asked = []

    def pieces():
        for piece in rows(0, 1):
            asked.append(piece[0])
            yield piece

    for name, _ in whole(pieces(), SHAPES):
        assert asked[-1] == name


def test_missing_rows_are_an_error():
    with pytest.raises(ValueError, match="2 weights, for example a"):
        list(whole(rows(0, 2), SHAPES))


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="elsewhere"):
        list(whole([("elsewhere", 0, torch.zeros(2))], SHAPES))


def test_buckets_hold_everything_in_order():
    named = [(str(i), torch.zeros(10, dtype=torch.float32)) for i in range(7)]
    cut = list(buckets(iter(named), num_bytes=80))
    assert [len(bucket) for bucket in cut] == [2, 2, 2, 1]
    assert [name for bucket in cut for name, _ in bucket] == [name for name, _ in named]
    assert list(buckets([])) == []
