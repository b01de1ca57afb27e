"""Generated sums for ``data.type: arithmetic``: ``"57+38="`` with the answer ``"95"``.

Held-out sums are drawn first, so they are the same whatever the number of training sums; nothing depends on a seed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from rlinf_lite.config import ArithmeticConfig, ConfigError
from rlinf_lite.counters import counter_hash
from rlinf_lite.data.questions import Question

MAX_DIGITS = 9
"""Pairs of longer operands cannot be numbered in an int64."""


def sums(config: ArithmeticConfig, split: Literal["train", "val"]) -> list[Question]:
    """The sums of one split: distinct pairs of operands with exactly ``num_digits`` digits, none in both splits.

    Raises:
        ConfigError: operands of no or too many digits, more sums than there are, or a question without them.
    """
    _check(config)
    held_out = config.num_val_problems
    drawn = _distinct_pairs(config.num_digits, held_out + config.num_problems)
    pairs = drawn[:held_out] if split == "val" else drawn[held_out:]
    low, high = _operand_range(config.num_digits)
    operands = [(low + pair // (high - low), low + pair % (high - low)) for pair in pairs.tolist()]
    return [_question(config.question, *pair, number) for number, pair in enumerate(operands, start=1)]


def _question(wording: str, left: int, right: int, number: int) -> Question:
    content = wording.replace("{a}", str(left)).replace("{b}", str(right))
    return Question(path="arithmetic", line=number, content=content, answer=str(left + right))


def _operand_range(num_digits: int) -> tuple[int, int]:
    """[low, high): numbers of exactly ``num_digits`` digits; zero is one of the one-digit numbers."""
    return (0 if num_digits == 1 else 10 ** (num_digits - 1)), 10**num_digits


def _num_pairs(num_digits: int) -> int:
    low, high = _operand_range(num_digits)
    return (high - low) ** 2


def _distinct_pairs(num_digits: int, count: int) -> np.ndarray:
    """The first ``count`` distinct numbers (int64) in an endless stream of hashed draws over all pairs."""
    space, num_draws = _num_pairs(num_digits), 2 * count
    while True:
        draws = counter_hash("arith", num_digits, np.arange(num_draws)) % np.uint64(space)
        first_seen = np.sort(np.unique(draws, return_index=True)[1])
        if len(first_seen) >= count:
            return draws[first_seen[:count]].astype(np.int64)
        num_draws *= 2


def _check(config: ArithmeticConfig) -> None:
    if not 1 <= config.num_digits <= MAX_DIGITS:
        raise ConfigError(f"data.arithmetic.num_digits: {config.num_digits}; choose 1 to {MAX_DIGITS}")
    if "{a}" not in config.question or "{b}" not in config.question:
        raise ConfigError(f"data.arithmetic.question: {config.question!r}; write {{a}} and {{b}} where the numbers go")
    for key, value in (("num_problems", config.num_problems), ("num_val_problems", config.num_val_problems)):
        if value < 0:
            raise ConfigError(f"data.arithmetic.{key}: {value}; choose 0 or more")
    space = _num_pairs(config.num_digits)
    if config.num_problems + config.num_val_problems > space:
        left = max(space - config.num_val_problems, 0)
        raise ConfigError(
            f"data.arithmetic.num_problems: {config.num_problems}, and {config.num_val_problems} held-out ones "
            f"(data.arithmetic.num_val_problems), are more than the {space} sums of {config.num_digits}-digit numbers; "
            f"choose at most {left}, or more digits"
        )
