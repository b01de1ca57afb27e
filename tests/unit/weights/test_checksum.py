"""Checksums of weights: the same from any pieces, and another one after any change."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.weights.checksum import added, checksums, first_difference
from rlinf_lite.weights.pieces import WeightPiece

SHAPES = [(7,), (33, 1), (40, 12), (9, 5), (6, 3, 5), (3000, 300), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def made(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9
    return values > 0 if dtype == torch.bool else values.to(dtype)


def of(tensor: torch.Tensor) -> int:
    return checksums([WeightPiece("w", 0, tensor)])["w"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_any_ranks_add_up_to_the_whole(shape, dtype):
    whole = made(shape, dtype)
    rows = whole if whole.dim() else whole.reshape(1)
    for num_ranks in (1, 2, 3, 5):
        size = -(-len(rows) // num_ranks)
        ranks = [
            checksums([WeightPiece("w", start, rows[start : start + size])]) for start in range(0, len(rows) + 1, size)
        ]
        assert added(reversed(ranks)) == {"w": of(whole)}
    assert of(whole.clone()) == of(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_changed_element_is_noticed(shape, dtype):
    whole = made(shape, dtype)
    flat = whole.clone().view(-1)
    for place in {0, len(flat) // 2, len(flat) - 1}:
        changed = flat.clone()
        changed[place] = changed[place] + 1 if dtype != torch.bool else ~changed[place]
        assert of(changed.view(shape)) != of(whole)


def test_the_lowest_and_the_highest_bit_are_noticed():
    whole = made((40, 12), torch.float32)
    for bit in (1, -(2**31)):
        changed = whole.clone()
        changed.view(torch.int32)[17, 3] ^= bit
        assert of(changed) != of(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_that_changed_places_are_noticed(dtype):
    whole = made((40, 12), dtype)
    order = torch.arange(40)
    order[[3, 29]] = order[[29, 3]]
    columns = torch.arange(12)
    columns[[2, 5]] = columns[[5, 2]]
    for changed in (whole[order], whole[:, columns], whole.flip(0), whole.roll(1, 0), whole.roll(1, 1)):
        assert of(changed.contiguous()) != of(whole)
    assert of(made((7,), dtype).flip(0)) != of(made((7,), dtype))


def test_the_first_weight_that_differs_is_named():
    a, b = made((4, 3), torch.float32), made((5, 2), torch.float32)
    sent = checksums([WeightPiece("a", 0, a), WeightPiece("b", 0, b)])
    assert first_difference(sent, dict(sent)) is None
    assert first_difference(sent, {**sent, "b": 1}) == "b"
    swapped = checksums([WeightPiece("a", 0, b), WeightPiece("b", 0, a)])
    assert first_difference(sent, swapped) == "a"
    assert first_difference(sent, {"a": sent["a"]}) == "b" == first_difference({"a": sent["a"]}, sent)
