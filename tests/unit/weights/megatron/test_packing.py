"""The flat order of Megatron's optimizer: reversed, aligned, without a tail."""

from __future__ import annotations

import pytest
import torch

from rlinf_lite.weights.megatron.packing import Slot, pack, slots, unpack

SHAPES = {"first": (3, 5), "second": (64,), "third": (70,), "last": (2, 2)}


def test_parameters_are_packed_from_the_last_to_the_first():
    assert slots(SHAPES) == [
        Slot("last", 0, 4),
        Slot("third", 64, 134),
        Slot("second", 192, 256),
        Slot("first", 256, 271),
    ]


def test_what_is_packed_comes_back_and_gaps_are_zero():
    values = {name: torch.randn(shape) + 10 for name, shape in SHAPES.items()}
    flat = pack(values, SHAPES)
    assert flat.shape == (271,)
    assert flat.dtype == torch.float32
    assert int((flat == 0).sum()) == 271 - sum(value.numel() for value in values.values())
    back = unpack(flat, SHAPES)
    assert list(back) == list(SHAPES)
    assert all(torch.equal(back[name], value) for name, value in values.items())


def test_another_length_is_an_error():
    with pytest.raises(ValueError, match="take 271 floats"):
        unpack(torch.zeros(270), SHAPES)
