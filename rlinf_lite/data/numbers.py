"""Formats numbers of data files as answers: plain decimals without exponent, exactly the number that is stored."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

_MAX_DIGITS = 4300
"""Python's own limit on integers. Without it ``1e999999999`` would fill the memory."""


def number_text(value: Any, exact: Any = None) -> str | None:
    """``1e-05`` -> ``"0.00001"``, ``1e22`` -> ``"10000000000000000000000"``; None if ``value`` is not a finite number.

    Args:
        value: an int, float, `Decimal` or numpy scalar. A bool is not a number.
        exact: the same number as a `Decimal`, if the float ``value`` may have lost or gained digits.

    Raises:
        OverflowError: the number has more than 4300 digits.
    """
    if isinstance(value, np.generic):
        # The shortest decimal of a float32 differs from that of the float64 it converts to.
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
