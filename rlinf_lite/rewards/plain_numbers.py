"""Parses plain numbers (``1,234.50``, ``$18``, ``12%``, ``-3/4``, ``1.5e3``) and compares them as fractions."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
# Longer exponents are left to the verifier, whose time and memory are limited.
_EXPONENT = r"(?:[eE](?P<e>[-+]?[0-9]{1,4})|(?P<ten> *\\(?:times|cdot) *10(?:\^\{(?P<power>[-+]?[0-9]{1,4})\})?))"
_PLAIN = re.compile(
    rf"(?P<sign>[-+]?) *(?P<number>{NUMBER})\.?{_EXPONENT}?(?: */ *(?P<divisor>[0-9]+))? *(?P<percent>%?)"
)
_FRACTION = re.compile(
    r"(?P<sign>[-+]?) *(?P<open>\()?(?:(?P<whole>[0-9]+)\+)?"
    r"\\frac\{(?P<minus>-?)(?P<over>[0-9]+)\}\{(?P<under>[0-9]+)\}(?(open)\)) *(?P<percent>%?)"
)
_SPELLINGS = (("\\$", ""), ("$", ""), ("\\%", "%"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\u2212", "-"))


MAX_CHARS = 2000
"""Longer final answers are wrong and are not parsed, so that one response cannot keep a verifier busy. (Python does not
parse integers of more than 4300 digits.)"""


class PlainNumber(NamedTuple):
    """A number, and whether it was written as a percentage: ``50%`` has the value 50."""

    value: Fraction
    is_percent: bool


def parse_number(text: str) -> PlainNumber | None:
    r"""Parse ``text`` as a plain number, such as ``1,234.5``, ``\frac{5}{4}`` or ``(1+\frac{1}{4})`` (a mixed number).

    Returns None for anything else: an expression, a unit, a division by 0, a text longer than `MAX_CHARS`.
    """
    if len(text) > MAX_CHARS:
        return None
    for spelling, meaning in _SPELLINGS:
        text = text.replace(spelling, meaning)
    text = text.strip().removesuffix(".")
    match = _PLAIN.fullmatch(text)
    if match is None or not match["number"]:
        return _parse_fraction(text) if "\\frac" in text else None
    divisor = int(match["divisor"] or 1)
    if divisor == 0:
        return None
    value = Fraction(match["sign"] + match["number"].replace(",", "")) / divisor
    exponent = match["e"] or match["power"] or ("1" if match["ten"] else None)
    if exponent is not None:
        value *= Fraction(10) ** int(exponent)
    return PlainNumber(value, bool(match["percent"]))


def _parse_fraction(text: str) -> PlainNumber | None:
    match = _FRACTION.fullmatch(text)
    if match is None or int(match["under"]) == 0 or (match["whole"] and match["minus"]):
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["minus"] + match["over"]), int(match["under"]))
    return PlainNumber(-value if match["sign"] == "-" else value, bool(match["percent"]))


def same_number(a: PlainNumber, b: PlainNumber) -> bool:
    """Whether two numbers are exactly equal. If only one is a percentage, ``50%`` equals both ``50`` and ``0.5``."""
    if a.value == b.value:
        return True
    return a.is_percent != b.is_percent and _as_ratio(a) == _as_ratio(b)


def _as_ratio(number: PlainNumber) -> Fraction:
    return number.value / 100 if number.is_percent else number.value
