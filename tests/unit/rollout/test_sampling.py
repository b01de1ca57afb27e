"""Sampling: frequencies, filters and penalties, compared with known distributions and with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from rlinf_lite.counters import counter_hash
from rlinf_lite.rollout.sampling import draw, penalize_repetition
from rlinf_lite.types import Sampling

NUM_DRAWS = 20_000


def sampling(**changes) -> Sampling:
    plain = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 1,
    }
    return Sampling(**{**plain, **changes})


def random_bits(count: int, *counters: int) -> torch.Tensor:
    bits = counter_hash("test", *counters, np.arange(count)) >> np.uint64(1)
    return torch.from_numpy(bits.astype(np.int64))


def frequencies(probs, params: Sampling) -> torch.Tensor:
    logits = torch.tensor(probs, dtype=torch.float64).log().float()
    drawn = draw(logits.expand(NUM_DRAWS, -1), params, random_bits(NUM_DRAWS))
    return torch.bincount(drawn, minlength=len(probs)) / NUM_DRAWS


def assert_follows(found: torch.Tensor, expected: list[float]) -> None:
    """Pearson's chi-square; 30 is beyond the 0.001 quantile for up to 9 degrees of freedom. The bits are fixed."""
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(found > 0, wanted > 0), found
    kept = wanted > 0
    assert (NUM_DRAWS * (found.double()[kept] - wanted[kept]) ** 2 / wanted[kept]).sum() < 30


def test_frequencies_are_the_softmax():
    probs = [0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005]
    assert_follows(frequencies(probs, sampling()), probs)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature):
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    powered = probs ** (1 / temperature)
    assert_follows(frequencies(probs.tolist(), sampling(temperature=temperature)), (powered / powered.sum()).tolist())


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 1.0, 0, 0, 0]),
        (2, [0, 2 / 3, 1 / 3, 0, 0]),
        (3, [0.1 / 0.95, 0.5 / 0.95, 0.25 / 0.95, 0.1 / 0.95, 0]),  # two tokens tie for third place
        (5, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (99, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (0, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (-1, [0.1, 0.5, 0.25, 0.1, 0.05]),
    ],
)
def test_top_k_keeps_ties(top_k, expected):
    assert_follows(frequencies([0.1, 0.5, 0.25, 0.1, 0.05], sampling(top_k=top_k)), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [1]),
        (0.5, [1]),  # reached by the first alone
        (0.51, [1, 2]),
        (0.75, [1, 2]),
        (0.8, [0, 1, 2, 3]),  # both tied tokens are kept
        (0.97, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
        (1e-15, [1]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it_and_ties(top_p, kept):
    probs = torch.tensor([0.1, 0.5, 0.25, 0.1, 0.05])
    mass = sum(probs[i].item() for i in kept)
    expected = [probs[i].item() / mass if i in kept else 0.0 for i in range(5)]
    assert_follows(frequencies(probs.tolist(), sampling(top_p=top_p)), expected)


def test_top_p_applies_after_top_k():
    # Of 0.5 and 0.25 the first is 2/3 of the whole: enough for 0.6, although it is 0.5 of the unfiltered one.
    assert_follows(frequencies([0.1, 0.5, 0.25, 0.1, 0.05], sampling(top_k=2, top_p=0.6)), [0, 1.0, 0, 0, 0])


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -200.0, -torch.inf])
    drawn = draw(logits.expand(NUM_DRAWS, -1), sampling(), random_bits(NUM_DRAWS))
    assert set(drawn.tolist()) == {1, 3}
    last = draw(logits.expand(2, -1), sampling(), torch.tensor([2**63 - 1, 0]))  # the smallest and the largest
    assert set(last.tolist()) <= {1, 3}


def test_all_random_bits_select_a_token():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([0, 1, 2**40 - 1, 2**40, 2**62, 2**63 - 1])
    drawn = draw(logits.expand(len(edges), -1), sampling(), edges)
    assert drawn.min() >= 0 and drawn.max() < 1000


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * 3
    params, bits = sampling(temperature=0.9, top_k=40, top_p=0.9), random_bits(50)
    together = draw(logits, params, bits)
    alone = torch.cat([draw(logits[i : i + 1], params, bits[i : i + 1]) for i in range(50)])
    assert torch.equal(together, alone)
    backwards = draw(logits.flip(0), params, bits.flip(0)).flip(0)
    assert torch.equal(together, backwards)


def test_integer_weights_have_the_same_sum_in_any_order():
    """The total, and so the sampled token, does not depend on the summation order: only each p is rounded."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(2))
    scaled = (logits.softmax(-1).double() * 2**40).round().long()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(3))
    assert scaled.sum() == scaled[:, order].sum() == scaled.flip(-1).cumsum(-1)[:, -1]
    bits = random_bits(1)
    total = int(scaled.sum())
    point = min(int((int(bits) >> 10) * 2.0**-53 * total), total - 1)
    by_hand = next(i for i, end in enumerate(np.cumsum(scaled[0].tolist())) if end > point)
    assert draw(logits, sampling(), bits).item() == by_hand


def test_low_precision_logits_draw_like_their_float32_values():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(4)).bfloat16()
    params, bits = sampling(temperature=0.7), random_bits(20)
    assert torch.equal(draw(logits, params, bits), draw(logits.float(), params, bits))


def test_greedy_takes_the_largest_and_ignores_the_rest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    params = sampling(do_sample=False, temperature=0.0, top_k=1, top_p=0.1)
    assert draw(logits, params, torch.zeros(2, dtype=torch.int64)).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_are_an_error_not_a_token(bad):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]])
    with pytest.raises(FloatingPointError, match="logits"):
        draw(logits, sampling(), random_bits(2))


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5)) * 4
    ids = torch.tensor([[1, 4, 4, 29], [0, 2, 2, 2], [7, 8, 9, 10]])
    seen = torch.zeros(3, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (1.3, 0.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


def test_a_last_bit_in_the_probabilities_hardly_moves_the_draw():
    """Other kernels, or another number of ranks, round differently: equal random bits still select equal tokens."""
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    nudged = logits * (1 + 2.0**-22)
    assert not torch.equal(logits.softmax(-1), nudged.softmax(-1))
    same = draw(logits, sampling(), random_bits(2000)) == draw(nudged, sampling(), random_bits(2000))
    assert same.float().mean() > 0.999
