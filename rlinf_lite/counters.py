"""Counter-based random numbers: pure functions of counters, with no state to save, the same on every machine.

Used for the order of prompts and for sampling. The mixer is SplitMix64's finalizer (Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), chained over the counters.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def counter_hash(*counters: int | str | np.ndarray) -> np.ndarray:
    """Hash each tuple of counters to 64 well-mixed bits.

    Args:
        counters: integers, short names, or integer arrays; arrays broadcast against each other. The order matters.

    Returns:
        uint64 array of the broadcast shape (0-d for scalars).
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            state = _mix((state + _GOLDEN) ^ _mix(_as_uint64(counter) + _GOLDEN))
    return state


def permutation(size: int, *counters: int | str) -> np.ndarray:
    """Shuffle ``arange(size)`` (int64) by ``counters`` alone: the same on every platform and numpy version."""
    return np.argsort(counter_hash(*counters, np.arange(size)), kind="stable")


def _as_uint64(counter: int | str | np.ndarray) -> np.ndarray:
    if isinstance(counter, str):
        return np.array(int.from_bytes(counter.encode()[:8], "little"), dtype=np.uint64)
    if isinstance(counter, int):
        return np.array(counter % 2**64, dtype=np.uint64)
    return counter.astype(np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
