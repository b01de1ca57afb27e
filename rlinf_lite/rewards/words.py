"""Recognizes and compares answers in words: ``Monday``, ``Yes``, ``July 4``, ``seven``."""

from __future__ import annotations

import re

_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_MATH_WORDS = frozenset(
    re.findall(
        r"[a-z]+",
        "sin cos tan cot sec csc log ln exp gcd lcm max min mod det arcsin arccos arctan sqrt bmod",
    )
)

_SHORT_WORDS = frozenset(["no", "am", "pm", "up", "dne"])
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_KEY = re.compile(r"[a-z]+|[0-9]+(?:\.[0-9]+)?|[^\sa-z0-9.,;:!?'\"-]|[-+](?=[0-9])")
_UNIMPORTANT = frozenset(("the", "a", "an", "and", "of", "is"))
_NUMBERS = re.findall(
    r"[a-z]+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty",
)
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}


def is_text(text: str) -> bool:
    """Whether ``text`` contains a word that is neither a function nor a product of letters."""
    return any(_is_word(match[0]) for match in _WORD.finditer(_without_environments(text)))


def _without_environments(text: str) -> str:
    return re.sub(r"\\(?:begin|end)\{[a-z]+\}", "", text)


def _is_word(word: str) -> bool:
    if word in _MATH_WORDS:
        return False
    if len(word) == 2:
        return word.lower() in _SHORT_WORDS or (word[0].isupper() and word[1].islower())
    return word not in _ALPHABET and word.lower() not in _ALPHABET and not (word.isupper() and len(word) <= 4)


def same_text(a: str, b: str) -> bool:
    """Whether two texts have the same words and numbers in order; case, punctuation, articles and plurals aside."""
    return _key(a) == _key(b)


def number_word(text: str) -> str | None:
    """``"7"`` of ``seven``; None if ``text`` is not a number in words."""
    return _NUMBER_WORDS.get(text.strip().lower())


def _key(text: str) -> list[str]:
    pieces = [piece for piece in _KEY.findall(text.lower()) if piece not in _UNIMPORTANT]
    return [piece[:-1] if len(piece) > 3 and piece.endswith("s") else piece for piece in pieces]
