"""Numbers as people write them (``1,234.50``, ``$18``, ``12%``, ``-3/4``), compared exactly as fractions."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
_PLAIN = re.compile(rf"(?P<sign>[-+]?) *(?P<number>{NUMBER})(?: */ *(?P<divisor>[0-9]+))? *(?P<percent>%?)")
_SPELLINGS = (("\\$", ""), ("$", ""), ("\\%", "%"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\u2212", "-"))


MAX_CHARS = 2000
"""No final answer is longer; a longer one is wrong unread, so that one response cannot keep a verifier busy (and Python
reads no integers of more than 4300 digits)."""


class PlainNumber(NamedTuple):
    """A number and whether it was written as a percentage (``value`` is then the figure before the sign)."""

    value: Fraction
    is_percent: bool


def parse_number(text: str) -> PlainNumber | None:
    """The plain number that ``text`` is, or None when it is anything else: an expression, a unit, division by 0, longer
    than `MAX_CHARS`.
    """
    for spelling, meaning in _SPELLINGS:
        text = text.replace(spelling, meaning)
    match = _PLAIN.fullmatch(text.strip().removesuffix(".")) if len(text) <= MAX_CHARS else None
    if match is None or not match["number"]:
        return None
    divisor = int(match["divisor"] or 1)
    if divisor == 0:
        return None
    value = Fraction(match["sign"] + match["number"].replace(",", "")) / divisor
    return PlainNumber(value, bool(match["percent"]))


def same_number(a: PlainNumber, b: PlainNumber) -> bool:
    """Exact equality; where only one is a percentage, ``50%`` equals both ``50`` and ``0.5``."""
    if a.value == b.value:
        return True
    return a.is_percent != b.is_percent and _as_ratio(a) == _as_ratio(b)


def _as_ratio(number: PlainNumber) -> Fraction:
    return number.value / 100 if number.is_percent else number.value
