"""Gumbel variables: the same hash in numpy and torch, the softmax's frequencies, and candidates that lose no winner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlinf_lite.counters import counter_hash
from rlinf_lite.rollout import gumbel

REAL_VOCABULARY = 151_936


def keys(count: int, *counters: int) -> np.ndarray:
    return counter_hash("test", *counters, np.arange(count))


def words(row_keys: np.ndarray, t: int | np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Both words of every token, uint32 [R, V], by numpy."""
    with np.errstate(over="ignore"):
        low, high = gumbel._row_words(row_keys, t)
        inner = gumbel._mixed(gumbel._token_terms(num_tokens) + low[:, None])
        return gumbel._words(inner, high[:, None])


def drawn_from_all(logits: torch.Tensor, temperature: float, row_keys: np.ndarray, t: int) -> np.ndarray:
    """By the definition: every token's logit over the temperature, plus its variable."""
    tokens = np.arange(logits.shape[1], dtype=np.uint32)
    return (logits.double().numpy() / temperature + gumbel.variables(row_keys, t, tokens)).argmax(1)


def test_pinned():
    """Another hash is another stream of tokens: it needs another `versions.sampler`."""
    first, second = words(np.array([0x0123456789ABCDEF], dtype=np.uint64), 7, 3)
    assert first.tolist() == [[1600682597, 3481282495, 3110342125]]
    assert second.tolist() == [[2883981264, 2425003559, 3539248175]]


def test_numpy_and_torch_agree_in_every_bit_of_the_hash():
    row_keys = np.concatenate([keys(50), np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)])
    steps = np.arange(len(row_keys))
    by_numpy = words(row_keys, steps, 3000)
    row_words, steps_R = gumbel.key_words(row_keys), torch.from_numpy(steps).int()
    by_torch = gumbel.words_on_device(row_words, steps_R, 3000)
    for ours, theirs in zip(by_numpy, by_torch, strict=True):
        assert np.array_equal(ours, theirs.numpy())
    by_numpy = gumbel.variables(row_keys, steps, np.arange(3000, dtype=np.uint32))
    by_torch = gumbel.variables_on_device(row_words, steps_R, 3000)
    np.testing.assert_allclose(by_torch.numpy(), by_numpy, rtol=0, atol=1e-14)  # the logarithms' last bits


def test_the_words_look_random():
    """Bits are even, and neither neighbouring tokens, steps, keys nor the two words of a token go together."""
    row_keys = np.arange(64, dtype=np.uint64)
    first, second = words(row_keys, 0, 4096)
    later, _ = words(row_keys, 1, 4096)
    bits = first.size * 32
    for other in (np.uint32(0), second, np.roll(first, 1, 0), np.roll(first, 1, 1), later):
        ones = np.bitwise_count(first ^ other).sum(dtype=np.int64)
        assert abs(ones - bits / 2) < 5 * np.sqrt(bits) / 2
    assert len(np.unique(words(row_keys, 3, 1024)[0])) > 0.9999 * 64 * 1024


def test_variables_are_finite_at_both_ends():
    ends = np.array([0, 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    ends_found = gumbel._gumbel(ends.repeat(4), np.tile(ends, 4))
    assert np.isfinite(ends_found).all() and ends_found.min() > -3.7 and 36.7 < ends_found.max() < 36.8
    assert np.all(np.diff(ends_found[ends.repeat(4) == np.tile(ends, 4)]) > 0)


def test_frequencies_of_a_million_draws_are_the_softmax():
    """Pearson's chi-square with 19 degrees of freedom: 43.8 is the 0.001 quantile. The keys are fixed."""
    count = 1_000_000
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    expected = (logits[0].double() / 0.8).softmax(-1).numpy() * count
    steps = np.arange(count) % 16
    drawn = gumbel.draw(logits.expand(count, -1), 0.8, keys(count), steps).numpy()
    found = np.bincount(drawn, minlength=20)
    assert ((found - expected) ** 2 / expected).sum() < 43.8


def test_frequencies_with_candidates_are_the_softmax():
    """As above for a vocabulary whose logarithms are not all taken: 64 bins of tokens, 63 degrees of freedom."""
    count, vocabulary = 40_000, 1024
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits[0].double().softmax(-1).view(64, -1).sum(-1).numpy() * count
    drawn = gumbel.draw(logits.expand(count, -1), 1.0, keys(count, 1), 5).numpy()
    found = np.bincount(drawn // 16, minlength=64)
    assert ((found - expected) ** 2 / expected).sum() < 103.4


def shapes_of_logits(num_rows: int, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    plain = torch.randn(num_rows, vocabulary, generator=generator)
    peaked = plain * 3
    peaked[:, vocabulary // 2] = 25.0
    masked = torch.where(torch.rand(plain.shape, generator=generator) < 0.9, -torch.inf, plain)
    masked[:, -1] = 0.0
    return {
        "uniform": torch.zeros(1, 1).expand(num_rows, vocabulary),
        "plain": plain,
        "peaked": peaked,
        "bf16": (plain * 8).bfloat16(),
        "far from 0": plain + 3e4,
        "large": plain * 1e30,
        "masked": masked,
    }


@pytest.mark.parametrize(("vocabulary", "num_rows"), [(20, 2000), (300, 500), (50_257, 6), (REAL_VOCABULARY, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.001, 100.0])
def test_candidates_lose_no_winner(vocabulary, num_rows, temperature, monkeypatch):
    monkeypatch.setattr(gumbel, "_SMALL_VOCABULARY", 0)
    row_keys = keys(num_rows, vocabulary)
    for name, logits in shapes_of_logits(num_rows, vocabulary).items():
        drawn = gumbel.draw(logits, temperature, row_keys, 3).numpy()
        assert np.array_equal(drawn, drawn_from_all(logits.float(), temperature, row_keys, 3)), name


def test_a_small_vocabulary_needs_no_candidates():
    row_keys = keys(2000)
    for name, logits in shapes_of_logits(2000, 20).items():
        assert np.array_equal(
            gumbel.draw(logits, 0.7, row_keys, 9).numpy(), drawn_from_all(logits.float(), 0.7, row_keys, 9)
        ), name


@pytest.mark.parametrize(("vocabulary", "num_rows"), [(20, 2000), (REAL_VOCABULARY, 2)])
def test_torch_draws_the_tokens_of_numpy(vocabulary, num_rows):
    row_keys = keys(num_rows, 2)
    for name, logits in shapes_of_logits(num_rows, vocabulary).items():
        by_torch, score = gumbel.draw_on_device(logits, 0.9, gumbel.key_words(row_keys), 4)
        assert torch.equal(by_torch, gumbel.draw(logits, 0.9, row_keys, 4)), name
        assert score.isfinite().all()


@pytest.mark.parametrize("vocabulary", [20, 1000])
def test_a_token_without_probability_is_never_drawn(vocabulary):
    """Also with a key whose variable for it is the largest."""
    possible = torch.arange(vocabulary) % 7 == 3
    logits = torch.full((vocabulary,), -torch.inf).masked_fill(possible, -5.0)
    drawn = gumbel.draw(logits.expand(10_000, -1), 1.0, keys(10_000), 0)
    assert possible[drawn].all()
    assert set(drawn.tolist()) == set(possible.nonzero()[:, 0].tolist())
    first, _ = words(keys(10_000), 0, vocabulary)
    assert (~possible[torch.from_numpy(first.argmax(1))]).any()


@pytest.mark.parametrize("vocabulary", [20, 1000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all masked"])
def test_broken_logits_are_an_error_not_a_token(vocabulary, bad):
    logits = torch.zeros(3, vocabulary)
    if bad == "all masked":
        logits[1] = -torch.inf
    else:
        logits[1, 7] = bad
    with pytest.raises(FloatingPointError, match="logits"):
        gumbel.draw(logits, 1.0, keys(3), 0)
    with pytest.raises(FloatingPointError, match="logits"):
        gumbel.require_finite(logits)


def test_logits_that_differ_a_little_keep_nearly_every_token():
    """What bfloat16 kernels change: a point in the cumulative probabilities would move to another token in 12 %."""
    logits = torch.randn(3000, 500, generator=torch.Generator().manual_seed(3)) * 2
    nudged = logits + 1e-2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    kept = gumbel.draw(logits, 1.0, keys(3000), 0) == gumbel.draw(nudged, 1.0, keys(3000), 0)
    assert kept.float().mean() > 0.98
