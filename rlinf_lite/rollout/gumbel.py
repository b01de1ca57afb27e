"""Gumbel variables as pure functions of (row key, step, token id), and the tokens that they select.

A token is ``argmax_v(logit_v / temperature + g_v)``: with independent Gumbel variables g that is a sample of the
softmax. Logits that differ in their last bits (other kernels, another number of ranks) then change few tokens; a point
in the cumulative probabilities, which shift all together, would change many (Daliri et al., "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978).

The hash takes 32-bit products, shifts and sums only, so numpy, torch and a GPU kernel agree in every bit. Logarithms do
not agree in their last bit everywhere: they are taken in float64, where that changes one token in about 10^15.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from rlinf_lite.errors import NotFinite

_GOLDEN, _OTHER_WORD = 0x9E3779B9, 0x5BD1E995
_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))  # then a last shift by 16: lowbias32 of Wellons' "hash-prospector"
_LAST_SHIFT = 16
_SMALL_VOCABULARY = 256
"""Up to here it is cheaper to take the logarithms of all tokens."""
_TOKENS_IN_CACHE = 1 << 16
_BITS_TO_LOG = math.log(2) / 2**23
"""The bits of a positive float32, as an integer, times this: its logarithm + 127 log 2, or up to 0.06 less."""
_LARGEST_BOUND = (127 + 31) * math.log(2)


def draw(logits_RV: Tensor, temperature: float, keys_R: np.ndarray, t: int | np.ndarray) -> Tensor:
    """Sample a token per row: on a CPU with numpy, elsewhere with torch.

    Args:
        logits_RV: float; -inf for tokens that must not be drawn.
        keys_R: uint64, as from `rollout.batches.rng_keys`.
        t: index of the token in its response, one for all rows or int64 [R].

    Returns:
        int64 [R].

    Raises:
        NotFinite: a row's largest logit is NaN or infinite: no token would mean anything.
    """
    if logits_RV.device.type != "cpu":
        require_finite(logits_RV)
        steps = torch.from_numpy(np.broadcast_to(np.asarray(t, dtype=np.int32), keys_R.shape).copy())
        words = key_words(keys_R).to(logits_RV.device)
        return draw_on_device(logits_RV, temperature, words, steps.to(logits_RV.device))[0]
    low_R, high_R = _row_words(keys_R, t)
    logits, tokens = logits_RV.float().numpy(), np.empty(len(keys_R), dtype=np.int64)
    vocabulary = logits.shape[1]
    part = max(1, _TOKENS_IN_CACHE // vocabulary)
    choose = _best_of_all if vocabulary <= _SMALL_VOCABULARY else _best_of_candidates
    with np.errstate(over="ignore"):
        for first in range(0, len(tokens), part):
            rows = slice(first, first + part)
            tokens[rows] = choose(logits[rows], temperature, low_R[rows], high_R[rows])
    return torch.from_numpy(tokens)


def require_finite(logits_RV: Tensor) -> None:
    """Raises NotFinite as `draw`. Waits for the device."""
    if not logits_RV.amax(-1).isfinite().all():
        raise not_finite()


def not_finite() -> NotFinite:
    """The error of a row from which no token can be drawn."""
    return NotFinite("logits are not finite, no token can be drawn: the weights or rollout.model.precision do not fit")


# -- numpy -------------------------------------------------------------------------------------------------------------


def variables(keys_R: np.ndarray, t: int | np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """Gumbel variables, float64 [R, N], of some tokens (uint32). Always finite: -3.7 to 36.8."""
    low_R, high_R = _row_words(keys_R, t)
    with np.errstate(over="ignore"):
        inner = _mixed(tokens_N * np.uint32(_GOLDEN) + low_R[:, None])
        return _gumbel(*_words(inner, high_R[:, None]))


def _row_words(keys_R: np.ndarray, t: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words per row and step, uint32 [R] each: a bijection of the key for each step."""
    with np.errstate(over="ignore"):
        steps_R = np.broadcast_to(np.asarray(t, dtype=np.uint32), keys_R.shape) * np.uint32(_GOLDEN)
        low_R = _mixed(keys_R.astype(np.uint32) + _mixed(steps_R))
        return low_R, _mixed((keys_R >> np.uint64(32)).astype(np.uint32) + low_R)


def _words(inner: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _mixed(inner + high), _mixed(inner + (high ^ np.uint32(_OTHER_WORD)))


def _mixed(z: np.ndarray) -> np.ndarray:
    """Mix uint32 values in place; returns them."""
    for shift, factor in _MIX:
        z ^= z >> np.uint32(shift)
        z *= np.uint32(factor)
    z ^= z >> np.uint32(_LAST_SHIFT)
    return z


def _gumbel(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """From two words each: u has 52 random bits and a last one that is set, so it is exact, and never 0 or 1."""
    u = high * 2.0**-32
    u += (low >> np.uint32(12)) * 2.0**-52
    u += 2.0**-53
    np.log(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)


@functools.lru_cache(maxsize=4)
def _token_terms(vocabulary: int) -> np.ndarray:
    return np.arange(vocabulary, dtype=np.uint32) * np.uint32(_GOLDEN)


def _best_of_all(logits: np.ndarray, temperature: float, low_R: np.ndarray, high_R: np.ndarray) -> np.ndarray:
    inner = _mixed(_token_terms(logits.shape[1]) + low_R[:, None])
    scores = logits.astype(np.float64) / temperature + _gumbel(*_words(inner, high_R[:, None]))
    tokens = scores.argmax(1)
    if not np.isfinite(scores[np.arange(len(tokens)), tokens]).all():
        raise not_finite()
    return tokens


def _best_of_candidates(logits: np.ndarray, temperature: float, low_R: np.ndarray, high_R: np.ndarray) -> np.ndarray:
    """As `_best_of_all`, with logarithms only for the few tokens that can win.

    -log(-log u) <= -log(1 - u), and 1 - u is at least the first word's complement; the bits of a float32 are a lower
    bound of its logarithm. So one pass without logarithms gives an upper bound of each token's score, up to rounding.
    """
    inner = _mixed(_token_terms(logits.shape[1]) + low_R[:, None])
    first_word = _mixed(inner + high_R[:, None])
    np.invert(first_word, out=first_word)
    first_word >>= np.uint32(1)
    remaining = first_word.view(np.int32).astype(np.float32)  # at most (1 - u) * 2^31
    bounds = remaining.view(np.int32).astype(np.float32)
    bounds *= np.float32(-temperature * _BITS_TO_LOG)
    bounds += logits

    def scores(row: np.ndarray, token: np.ndarray) -> np.ndarray:
        words = _words(inner[row, token], high_R[row])
        return logits[row, token].astype(np.float64) / temperature + _gumbel(*words)

    rows, top = np.arange(len(logits)), bounds.argmax(1)
    best = scores(rows, top)
    if not np.isfinite(best).all():
        raise not_finite()
    most = temperature * _LARGEST_BOUND
    # What rounding to float32 can take from a winner's bound, several times over.
    slack = 2.0**-20 * (np.abs(best * temperature) + np.abs(bounds[rows, top]) + 2 * most)
    can_win = bounds >= (best * temperature - most - slack).astype(np.float32)[:, None]
    row, token = np.divmod(np.flatnonzero(can_win), bounds.shape[1])  # much faster than nonzero of two dimensions
    order = np.lexsort((token, -scores(row, token), row))
    return token[order][np.unique(row[order], return_index=True)[1]]


# -- torch -------------------------------------------------------------------------------------------------------------


def key_words(keys_R: np.ndarray) -> Tensor:
    """The words of each key, int32 [R, 2]: what `draw_on_device` takes."""
    return torch.from_numpy(np.ascontiguousarray(keys_R)[:, None].view(np.int32).copy())


def draw_on_device(logits_RV: Tensor, temperature: float, words_R2: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
    """As `draw`, with torch, all inputs on one device. Does not wait for it, and raises nothing.

    Args:
        t: int32 [R], or one for all rows.

    Returns:
        The tokens int64 [R], and the score float64 [R] of each, which is not finite if no token can be drawn.
    """
    scores = variables_on_device(words_R2, t, logits_RV.shape[1])
    scores.add_(logits_RV.float().double() / temperature)
    token_R = scores.argmax(-1)
    return token_R, scores.gather(1, token_R[:, None])[:, 0]


def variables_on_device(words_R2: Tensor, t: Tensor | int, vocabulary: int) -> Tensor:
    """As `variables` of all tokens, float64 [R, V]."""
    high, low = words_on_device(words_R2, t, vocabulary)
    u = high.double().mul_(2.0**-32).add_((low >> 12).double(), alpha=2.0**-52).add_(2.0**-53)
    return u.log_().neg_().log_().neg_()


def words_on_device(words_R2: Tensor, t: Tensor | int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits per row and token, as int64 [R, V]."""
    low_R, high_R = row_words_on_device(words_R2, t)
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=words_R2.device)
    inner = _mixed_torch(tokens * _signed(_GOLDEN) + low_R[:, None])
    first = _mixed_torch(inner + high_R[:, None])
    second = _mixed_torch(inner + (high_R ^ _OTHER_WORD)[:, None])
    return first.long() & 0xFFFFFFFF, second.long() & 0xFFFFFFFF


def row_words_on_device(words_R2: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
    """Two words per row and step, int32 [R] each: a bijection of the key for each step."""
    steps = torch.as_tensor(t, dtype=torch.int32, device=words_R2.device) * _signed(_GOLDEN)
    low_R = _mixed_torch(words_R2[:, 0] + _mixed_torch(steps))
    return low_R, _mixed_torch(words_R2[:, 1] + low_R)


def _mixed_torch(z: Tensor) -> Tensor:
    for shift, factor in _MIX:
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, _LAST_SHIFT)


def _shifted(z: Tensor, shift: int) -> Tensor:
    return (z >> shift) & ((1 << (32 - shift)) - 1)  # torch shifts copies of the sign in


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
