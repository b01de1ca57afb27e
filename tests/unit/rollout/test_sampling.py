"""Sampling: filters and penalties, compared with a plain reference, known distributions and transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from rlinf_lite.counters import counter_hash
from rlinf_lite.rollout.sampling import draw, filtered, penalize_repetition
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


def keys(count: int) -> np.ndarray:
    return counter_hash("test", np.arange(count))


def frequencies(probs, params: Sampling) -> torch.Tensor:
    logits = torch.tensor(probs, dtype=torch.float64).log().float()
    drawn = draw(logits.expand(NUM_DRAWS, -1), params, keys(NUM_DRAWS), 0)
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
        (3, [0.1 / 0.85, 0.5 / 0.85, 0.25 / 0.85, 0, 0]),  # of two that tie for third place the first
        (5, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (99, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (0, [0.1, 0.5, 0.25, 0.1, 0.05]),
        (-1, [0.1, 0.5, 0.25, 0.1, 0.05]),
    ],
)
def test_top_k(top_k, expected):
    assert_follows(frequencies([0.1, 0.5, 0.25, 0.1, 0.05], sampling(top_k=top_k)), expected)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [1]),
        (0.5, [1]),  # reached by the first alone
        (0.51, [1, 2]),
        (0.75, [1, 2]),
        (0.8, [0, 1, 2]),  # of two that tie the first
        (0.9, [0, 1, 2, 3]),
        (0.97, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
        (1e-15, [1]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    probs = torch.tensor([0.1, 0.5, 0.25, 0.1, 0.05])
    mass = sum(probs[i].item() for i in kept)
    expected = [probs[i].item() / mass if i in kept else 0.0 for i in range(5)]
    assert_follows(frequencies(probs.tolist(), sampling(top_p=top_p)), expected)


def test_top_p_applies_after_top_k():
    # Of 0.5 and 0.25 the first is 2/3 of the whole: enough for 0.6, although it is 0.5 of the unfiltered one.
    assert_follows(frequencies([0.1, 0.5, 0.25, 0.1, 0.05], sampling(top_k=2, top_p=0.6)), [0, 1.0, 0, 0, 0])


@pytest.mark.parametrize(
    ("min_p", "kept"),
    [(0.0, [0, 1, 2, 3, 4]), (0.15, [0, 1, 2, 3]), (0.3, [1, 2]), (1.0, [1]), (1e-9, [0, 1, 2, 3, 4])],
)
def test_min_p_is_relative_to_the_most_likely(min_p, kept):
    probs = torch.tensor([0.1, 0.5, 0.25, 0.1, 0.05])
    mass = sum(probs[i].item() for i in kept)
    expected = [probs[i].item() / mass if i in kept else 0.0 for i in range(5)]
    assert_follows(frequencies(probs.tolist(), sampling(min_p=min_p)), expected)


def kept_by_hand(logits: list[float], params: Sampling) -> set[int]:
    """One token after the other, in the order of probability, then of ids."""
    scaled = [logit / params.temperature for logit in logits]
    order = sorted(range(len(logits)), key=lambda v: (-scaled[v], v))
    weight = {v: math.exp(scaled[v] - scaled[order[0]]) for v in order}
    order = [v for v in order if weight[v] > 0 and weight[v] >= params.min_p]
    if params.top_k > 0:
        order = order[: params.top_k]
    total, kept, mass = sum(weight[v] for v in order), set[int](), 0.0
    for v in order:
        if mass >= params.top_p * total and params.top_p < 1:
            break
        kept.add(v)
        mass += weight[v]
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("top_k", [-1, 1, 7, 60])
@pytest.mark.parametrize("top_p", [1.0, 0.93, 0.4])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.31])
def test_filters_keep_what_a_plain_reference_keeps(temperature, top_k, top_p, min_p):
    params = sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(40, 60, generator=generator) * 2
    logits[:20] = (logits[:20] * 2).round() / 2  # many ties
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -torch.inf
    kept = filtered(logits, params)
    for row, found in zip(logits.tolist(), kept, strict=True):
        assert set((found > -torch.inf).nonzero()[:, 0].tolist()) == kept_by_hand(row, params)
    assert torch.equal(kept[kept > -torch.inf], logits[kept > -torch.inf])


def test_a_filter_keeps_the_token_selected_without_it_unless_it_is_filtered_out():
    logits = torch.randn(2000, 60, generator=torch.Generator().manual_seed(8))
    plain = draw(logits, sampling(), keys(2000), 3)
    params = sampling(top_k=20, top_p=0.8, min_p=0.05)
    limited = draw(logits, params, keys(2000), 3)
    kept = filtered(logits, params).gather(1, plain[:, None])[:, 0] > -torch.inf
    assert torch.equal(plain[kept], limited[kept]) and 0 < kept.sum() < 2000


@pytest.mark.parametrize("vocabulary", [300, 20])
def test_a_row_does_not_depend_on_its_neighbours(vocabulary):
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    steps = np.arange(50) % 7
    for params in (sampling(), sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01)):
        together = draw(logits, params, keys(50), steps)
        alone = [draw(logits[i : i + 1], params, keys(50)[i : i + 1], int(steps[i])) for i in range(50)]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together, draw(logits.flip(0), params, keys(50)[::-1], steps[::-1]).flip(0))


def test_low_precision_logits_draw_like_their_float32_values():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(4)).bfloat16()
    for params in (sampling(temperature=0.7), sampling(temperature=0.7, top_p=0.8)):
        assert torch.equal(draw(logits, params, keys(20), 2), draw(logits.float(), params, keys(20), 2))


def test_greedy_takes_the_largest_and_ignores_the_rest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    params = sampling(do_sample=False, temperature=0.0, top_k=1, top_p=0.1)
    assert draw(logits, params, keys(2), 0).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("filters", [{}, {"do_sample": False}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_broken_logits_are_an_error_not_a_token(bad, filters):
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]])
    with pytest.raises(FloatingPointError, match="logits"):
        draw(logits, sampling(**filters), keys(2), 0)


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5)) * 4
    ids = torch.tensor([[1, 4, 4, 29], [0, 2, 2, 2], [7, 8, 9, 10]])
    seen = torch.zeros(3, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (1.3, 0.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


@pytest.mark.parametrize("given", [{"top_p": 0.7}, {"top_k": 3, "min_p": 0.01}])
def test_rows_are_filtered_alike_some_at_a_time(monkeypatch, given):
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(3))
    whole = filtered(logits, sampling(**given))
    for cached in (1, 120):
        monkeypatch.setattr("rlinf_lite.rollout.sampling._CACHED", cached)
        assert torch.equal(filtered(logits, sampling(**given)), whole)
