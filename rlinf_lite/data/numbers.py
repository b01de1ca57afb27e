"""Numbers of data files as answer text: plain decimals, without exponent, exactly the number that is stored."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

_MAX_DIGITS = 4300
"""As Python limits integers: ``1e999999999`` would fill the memory."""


def number_text(value: Any, exact: Any = None) -> str | None:
    """``1e-05`` -> ``"0.00001"``, ``1e22`` -> ``"10000000000000000000000"``; None if ``value`` is no finite number.

    Args:
        value: an int, float, `Decimal` or numpy scalar; a bool is no number.
        exact: the same number as a `Decimal`, where the float ``value`` may have lost or gained digits.

    Raises:
        OverflowError: more digits than anyone can mean.
    """
    if isinstance(value, np.generic):
        # The shortest digits that name a float32 are not those of the float64 it becomes.
        value = Decimal(str(value)) if isinstance(value, np.floating) else value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    nearest = Decimal(repr(value)) if isinstance(value, float) else value
    stored = exact if isinstance(exact, Decimal) and exact != nearest else nearest
    if not stored.is_finite():
        return None
    if abs(stored.adjusted()) > _MAX_DIGITS:
        raise OverflowError(f"a number of more than {_MAX_DIGITS} digits")
    return format(abs(stored) if stored == 0 else stored, "f")
