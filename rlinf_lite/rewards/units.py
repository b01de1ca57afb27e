"""Splits quantities into number and unit, and compares units: ``12 cm^2``, ``$18``, ``5 miles per hour``."""

from __future__ import annotations

import re
from typing import NamedTuple

_SAME = """cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|m meter metre|kg kilogram kilo
g gram gm|mg milligram|l liter litre|ml milliliter millilitre|s sec second|min minute|h hr hour|day|week wk|month
year yr|mph|kmh kph
ft foot feet|in inch inche|yd yard|mi mile|lb lbs pound|oz ounce|gal gallon|dollar usd buck|cent|euro|deg|rad radian
n newton|j joule|w watt|v volt|a ampere amp|k kelvin|pa pascal|hz hertz|ohm|mol mole|unit|am|pm|acre|ha hectare"""
_CANONICAL = {name: group.split()[0] for group in re.split(r"[|\n]", _SAME) for name in group.split()}
_SYMBOLS_ALONE = "mgshLlNJWVKACF"
_NOT_UNITS = frozenset(
    re.findall(
        r"[a-z]+",
        "and or to than minus plus over squared cubed factorial choose mod more less not if is are in "
        "where for all any with",
    )
)

_MONEY = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
_MONEY |= {"USD": "dollar", "US$": "dollar", "Rs": "rupee", "EUR": "euro", "GBP": "pound sterling"}
_LEADING_MONEY = re.compile(r"([-+]?) *(US\$|USD|EUR|GBP|Rs(?=\.? *[0-9])|[$€£¥₹])\.? *([-+]?[0-9.\\(].*)", re.DOTALL)
_TRAILING_MONEY = re.compile(r"(.*[0-9)}]) *([$€£¥₹])", re.DOTALL)
_WORD = r"[A-Za-z]+\.?(?: ?\^ ?\{? ?-?[0-9] ?\}?)?"
# One word directly after the number, or several words; "/" means "per".
_TAIL = re.compile(
    rf"(?:(?<=[0-9)}}!])|(?<=\\pi))( *)({_WORD}(?:(?: |/| / | ?\\cdot ?|-){_WORD})*)$|(\^\\circ ?[CF]?)$"
)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


_COMPOUND = re.compile(r"([0-9][0-9.,]*) *([A-Za-z]+(?: (?!and\b|or\b)[A-Za-z]+)?)\.?(?: *(?:,|and|,? and) +| +|$)")


class Quantity(NamedTuple):
    """The text before the unit, and the unit's canonical name; empty if there is no unit."""

    number: str
    unit: str


def split_unit(text: str) -> Quantity:
    """Split the unit off ``text``, which is in normal form. A variable is not a unit: ``12 x`` stays whole."""
    money = _LEADING_MONEY.fullmatch(text)
    if money:
        number = split_unit(money[3]).number
        return Quantity(money[1] + number, _MONEY[money[2]])
    money = _TRAILING_MONEY.fullmatch(text)
    if money:
        return Quantity(money[1], _MONEY[money[2]])
    tail = _TAIL.search(text)
    if tail is None:
        return Quantity(text, "")
    number = text[: tail.start()].strip()
    if tail[3] and _FUNCTION.search(number):
        return Quantity(text, "")
    if tail[3]:
        return Quantity(number, tail[3].replace(" ", ""))
    if not _is_unit(tail[2], has_space=bool(tail[1])):
        return Quantity(text, "")
    return Quantity(number, canonical_unit(tail[2]))


def compound(text: str) -> list[tuple[str, str]] | None:
    """``[("3", "h"), ("20", "min")]`` of ``3 hours and 20 minutes``; None if ``text`` is not several quantities."""
    found, start = [], 0
    while start < len(text):
        match = _COMPOUND.match(text, start)
        if match is None or not _is_unit(match[2], has_space=True):
            return None
        found.append((match[1].replace(",", ""), canonical_unit(match[2])))
        start = match.end()
    return sorted(found) if len(found) > 1 else None


def same_unit(a: str, b: str) -> bool:
    """Whether two units are compatible.

    A missing unit is compatible with any. Units other than the common ones (``duck eggs``, ``eggs``) need one shared
    word.
    """
    if not a or not b or a == b:
        return True
    words_a, words_b = set(a.split()), set(b.split())
    known = set(_CANONICAL.values())
    if words_a & known and words_b & known:
        return False
    return bool(words_a & words_b)


def canonical_unit(words: str) -> str:
    r"""``square feet`` and ``ft^{2}`` are ``ft^2``; ``km/h``, ``kmh`` and ``kilometers per hour`` are ``km / h``."""
    words = words.replace("\\cdot", " ").replace("{", "").replace("}", "").replace(" ^", "^").replace("^ ", "^")
    words = re.sub(r"/|\bper\b|\ban?\b(?= )", " / ", words).replace("-", " ")
    parts = [_canonical_word(word) for word in words.split()]
    text = " ".join(part for part in parts if part)
    text = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu) (\w+)", r"\1^3", text)
    return {"mph": "mi / h", "kmh": "km / h"}.get(text, text)


def _canonical_word(word: str) -> str:
    base, caret, power = word.rstrip(".").partition("^")
    base = base.lower()
    for ending in ("", "s", "es"):
        if (ending == "" and base in _CANONICAL) or (
            base.endswith(ending) and base[: -len(ending) or None] in _CANONICAL
        ):
            return _CANONICAL[base[: -len(ending) or None]] + caret + power
    return (base[:-1] if base.endswith("s") and len(base) > 2 else base) + caret + power


def _is_unit(words: str, has_space: bool) -> bool:
    found = re.findall(r"[A-Za-z]+", words)
    if any(word.lower() in _NOT_UNITS for word in found):
        return False
    first = found[0]
    if len(first) == 1:
        return has_space and first in _SYMBOLS_ALONE and all(len(w) > 1 or w in _SYMBOLS_ALONE for w in found)
    return has_space or _canonical_word(first) in set(_CANONICAL.values()) or first in ("th", "st", "nd", "rd")
