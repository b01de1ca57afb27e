"""RNG state: after a restore the next random numbers are the same."""

import random

import numpy as np
import pytest
import torch

from rlinf_lite import rng


@pytest.fixture(autouse=True)
def keep_rng_state():
    before = rng.capture()
    yield
    rng.restore(before)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw():
    """Odd numbers of normal variates leave one cached in python and numpy."""
    return [
        *(random.gauss(0, 1) for _ in range(3)),
        random.random(),
        *np.random.standard_normal(3),
        np.random.randint(2**31),
        *torch.randn(3).tolist(),
        *torch.randperm(9).tolist(),
    ]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_the_next_numbers_are_the_same_after_a_restore(drawn_before):
    seed_all(3)
    for _ in range(drawn_before):
        draw()
    state = rng.capture()
    expected = [draw(), draw()]
    seed_all(4)
    draw()
    rng.restore(state)
    assert [draw(), draw()] == expected


def test_a_cached_normal_variate_comes_back():
    seed_all(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = rng.capture()
    expected = random.gauss(0, 1), np.random.standard_normal()
    seed_all(4)
    rng.restore(state)
    assert (random.gauss(0, 1), np.random.standard_normal()) == expected


def test_capturing_draws_nothing():
    seed_all(3)
    expected = draw()
    seed_all(3)
    rng.capture()
    assert draw() == expected


def test_a_state_is_tensors_only():
    assert all(isinstance(value, torch.Tensor) for value in rng.capture().values())


def test_a_state_is_a_copy():
    seed_all(3)
    state = rng.capture()
    before = {name: value.clone() for name, value in state.items()}
    draw()
    assert all(torch.equal(state[name].nan_to_num(), before[name].nan_to_num()) for name in state)


def test_reseeding_depends_on_seed_step_and_rank_alone():
    seen = {}
    for counters in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        rng.reseed(*counters)
        seen[counters] = tuple(draw())
    assert len(set(seen.values())) == len(seen)
    rng.reseed(1, 2, 3)
    assert tuple(draw()) == seen[1, 2, 3]


def test_each_rank_has_a_key_of_its_own():
    keys = {rng.key(rank) for rank in range(20)}
    assert len(keys) == 20
    assert all(key.startswith(rng.PREFIX) for key in keys)
