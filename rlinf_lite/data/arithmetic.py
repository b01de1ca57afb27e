"""Generates sums for ``data.type: arithmetic``: ``"57+38="`` with the answer ``"95"``.

Validation sums are drawn first, so they do not depend on the number of training sums. There is no seed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from rlinf_lite.config import ArithmeticConfig, ConfigError
from rlinf_lite.counters import counter_hash
from rlinf_lite.data.questions import Question


def generate_sums(config: ArithmeticConfig, split: Literal["train", "val"]) -> list[Question]:
    """The sums of a split: distinct pairs of operands with exactly ``num_digits`` digits, none of them in both splits.

    Raises:
        ConfigError: more sums than there are.
    """
    _check(config)
    num_val = config.num_val_problems
    drawn = _distinct_pairs(config.num_digits, num_val + config.num_problems)
    pairs = drawn[:num_val] if split == "val" else drawn[num_val:]
    low, high = _operand_range(config.num_digits)
    operands = [(low + pair // (high - low), low + pair % (high - low)) for pair in pairs.tolist()]
    return [_question(config.question, *pair, number) for number, pair in enumerate(operands, start=1)]


def _question(wording: str, left: int, right: int, number: int) -> Question:
    content = wording.replace("{a}", str(left)).replace("{b}", str(right))
    return Question(path="arithmetic", line=number, content=content, answer=str(left + right))


def _operand_range(num_digits: int) -> tuple[int, int]:
    """[low, high): the numbers of exactly ``num_digits`` digits; zero has one digit."""
    return (0 if num_digits == 1 else 10 ** (num_digits - 1)), 10**num_digits


def _num_pairs(num_digits: int) -> int:
    low, high = _operand_range(num_digits)
    return (high - low) ** 2


def _distinct_pairs(num_digits: int, count: int) -> np.ndarray:
    """int64 [count]: the first distinct numbers in an endless stream of hashed draws over all pairs."""
    space, num_draws = _num_pairs(num_digits), 2 * count
    while True:
        draws = counter_hash("arith", num_digits, np.arange(num_draws)) % np.uint64(space)
        first_seen = np.sort(np.unique(draws, return_index=True)[1])
        if len(first_seen) >= count:
            return draws[first_seen[:count]].astype(np.int64)
        num_draws *= 2


def _check(config: ArithmeticConfig) -> None:
    space = _num_pairs(config.num_digits)
    if config.num_problems + config.num_val_problems > space:
        left = max(space - config.num_val_problems, 0)
        raise ConfigError(
            f"data.arithmetic.num_problems: {config.num_problems} and {config.num_val_problems} for validation "
            f"(data.arithmetic.num_val_problems) are more than the {space} sums of {config.num_digits}-digit numbers; "
            f"choose at most {left}, or more digits"
        )
