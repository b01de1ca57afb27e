"""Parses the structure of an answer in normal form: lists, tuples, sets, intervals, equations, matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(r"\\begin\{|\\end\{|\\[{}]|\\[A-Za-z]+|\\\\|\\.|[A-Za-z]+|[(\[{)\]}]|[^\s]|\s+", re.DOTALL)
_OPENING = frozenset(("(", "[", "{", "\\{", "\\begin{", "\\langle", "\\lfloor", "\\lceil"))
_CLOSING = frozenset((")", "]", "}", "\\}", "\\end{", "\\rangle", "\\rfloor", "\\rceil"))
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_MATRIX = re.compile(r"[\[(|]?\s*\\begin\{(\w+)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[\])|]?", re.DOTALL)


class Items(NamedTuple):
    r"""A list, tuple or set: ``(1, 2)``, ``\{1, 2\}``, or ``1, 2`` with empty brackets."""

    opening: str
    parts: tuple[str, ...]
    closing: str


class Interval(NamedTuple):
    """An interval. Its ends are texts; an infinite end is open."""

    low: str
    high: str
    low_is_open: bool
    high_is_open: bool


class Region(NamedTuple):
    """A union of intervals (and of other sets, as text), and the variable that lies in it; empty if it has no name."""

    variable: str
    pieces: tuple[Interval | str, ...]


def split_top(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Split ``text`` at separators outside all brackets; each part with the separator before it ("" for the first)."""
    parts: list[tuple[str, str]] = []
    depth, start, before = 0, 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append((before, text[start : match.start()].strip()))
            before, start = token, match.end()
    return [*parts, (before, text[start:].strip())]


def as_items(text: str) -> Items | None:
    """Parse ``text`` as a list, tuple or set; None if it is a single item. ``\\pm 2`` is a list of two."""
    bare = _split_list(text, in_brackets=False)
    if len(bare) > 1:
        return Items("", tuple(_both_signs(bare)), "")
    inner = enclosed(text)
    if inner is not None:
        opening, content, closing = inner
        parts = _split_list(content, in_brackets=True)
        if len(parts) > 1 or opening == "\\{":
            signed = _both_signs(parts) if opening == "\\{" else parts
            return Items(opening, tuple(signed), closing)
    signed = list(_both_signs([text]))
    return Items("", tuple(signed), "") if len(signed) > 1 else None


def enclosed(text: str) -> tuple[str, str, str] | None:
    """``(opening, content, closing)`` if one pair of brackets encloses all of ``text``."""
    depth, opening = 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if not opening:
            if token not in ("(", "[", "{", "\\{", "\\langle"):
                return None
            opening, start = token, match.end()
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
            if depth == 0:
                is_all = match.end() == len(text)
                names = {"\\langle": "(", "\\rangle": ")"}
                found = names.get(opening, opening), text[start : match.start()].strip(), names.get(token, token)
                return found if is_all else None
    return None


def _split_list(text: str, in_brackets: bool) -> list[str]:
    """Split at commas, semicolons, "and" and "or". The comma of ``1,234`` separates only if all commas look so."""
    hidden = _THOUSANDS.sub(lambda match: match[0].replace(",", "\0"), text)
    parts = [part for _, part in split_top(hidden, frozenset((",", ";", "and", "or")))]
    if in_brackets and len(parts) == 1 and "\0" in hidden:
        parts = [part for _, part in split_top(text, frozenset(",;"))]
    parts = [part.replace("\0", ",") for part in parts]
    if len(parts) > 1:
        parts = [part for part in parts if part]  # "1, 2, and 3" has an empty part
    return parts


def _both_signs(parts: list[str]) -> Iterator[str]:
    for part in parts:
        if not _PLUS_MINUS.search(part):
            yield part
            continue
        for plus, minus in ("+-", "-+"):
            signed = _PLUS_MINUS.sub(lambda match: plus if match[1] == "pm" else minus, part)  # noqa: B023
            yield re.sub(r"(^|[=(,{])\s*\+", r"\1", signed)


_RELATIONS = {"<": "<", ">": ">", "\\le": "<=", "\\ge": ">="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?")
_SET_BUILDER = re.compile(
    rf"\\\{{\s*{_VARIABLE.pattern}\s*(?:\\in\s*(?:\\mathbb\{{\w\}}|\(-\\infty ?,\s*\\infty ?\))\s*)?"
    r"(?:\||:)([^|:]+)\\\}"
)
_MEMBER = re.compile(rf"\s*({_VARIABLE.pattern})\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)


def as_region(text: str) -> Region | None:
    r"""Parse ``text`` as a part of the real line, if it can be nothing else.

    It is an inequality in one variable, a union, ``\{x : x < 3\}``, or an interval with an infinite end or two kinds of
    brackets. ``(1, 2)`` may also be a point; see `as_interval`.
    """
    built = _SET_BUILDER.fullmatch(text)
    if built:
        return _inequalities(built[1])
    member = _MEMBER.fullmatch(text)
    if member:
        inner = as_region(member[2])
        one = as_interval(member[2])
        pieces = inner.pieces if inner else (one,) if one else ()
        return Region(member[1], pieces) if pieces else None
    united = [part for _, part in split_top(text, frozenset(("\\cup",)))]
    if len(united) > 1:
        return Region("", tuple(as_interval(part) or part for part in united))
    interval = as_interval(text)
    if interval:
        is_certain = (text[0] == "(") != (text[-1] == ")") or "\\infty" in interval.low + interval.high
        return Region("", (interval,)) if is_certain else None
    return _inequalities(text)


def as_interval(text: str) -> Interval | None:
    """Parse ``(a, b)``, ``[a, b]``, ``(a, b]`` or ``[a, b)``, with exactly two ends."""
    inner = enclosed(text)
    if inner is None or inner[0] not in ("(", "[") or inner[2] not in (")", "]"):
        return None
    parts = _split_list(inner[1], in_brackets=True)
    return _interval(parts[0], parts[1], inner[0] == "(", inner[2] == ")") if len(parts) == 2 else None


def _interval(low: str, high: str, low_is_open: bool, high_is_open: bool) -> Interval:
    return Interval(low, high, low_is_open or "\\infty" in low, high_is_open or "\\infty" in high)


def _inequalities(text: str) -> Region | None:
    """Parse inequalities in one variable: ``x < 1 or x > 2``, ``1 < x and x < 2``."""
    alternatives = [_conjunction(part) for _, part in split_top(text, frozenset(("or",)))]
    found = [one for one in alternatives if one is not None]
    if len(found) < len(alternatives) or len({variable for variable, _ in found}) != 1:
        return None
    return Region(found[0][0], tuple(interval for _, interval in found))


def _conjunction(text: str) -> tuple[str, Interval] | None:
    parts = [_inequality(part) for _, part in split_top(text, frozenset(("and", ",")))]
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 2 or parts[0] is None or parts[1] is None or parts[0][0] != parts[1][0]:
        return None
    (variable, first), (_, second) = parts[0], parts[1]
    lower, upper = (first, second) if second.low == "-\\infty" else (second, first)
    if lower.high != "\\infty" or upper.low != "-\\infty":
        return None
    return variable, Interval(lower.low, upper.high, lower.low_is_open, upper.high_is_open)


def _inequality(text: str) -> tuple[str, Interval] | None:
    """``(variable, interval)`` of ``x < 3``, ``3 > x`` or ``1 \\le x < 3``."""
    parts = split_top(text, frozenset(_RELATIONS))
    sides = [part for _, part in parts]
    signs = [_RELATIONS[sign] for sign, _ in parts[1:]]
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and not _VARIABLE.fullmatch(sides[0]):
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(sides) == 3 and signs[0][0] == signs[1][0] == ">":
        sides, signs = sides[::-1], [_FLIPPED[signs[1]], _FLIPPED[signs[0]]]
    if not all(sides) or any("\\ne" in side or "=" in side for side in sides):
        return None
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]):
        is_open = signs[0] in ("<", ">")
        if signs[0][0] == "<":
            return sides[0], _interval("-\\infty", sides[1], True, is_open)
        return sides[0], _interval(sides[1], "\\infty", is_open, True)
    if len(sides) == 3 and _VARIABLE.fullmatch(sides[1]) and signs[0][0] == signs[1][0] == "<":
        return sides[1], _interval(sides[0], sides[2], signs[0] == "<", signs[1] == "<")
    return None


def as_relation(text: str) -> tuple[str, str, str] | None:
    r"""``(left, sign, right)`` of an equation or inequality; sign is ``=``, ``\ne``, ``<``, ``>``, ``<=`` or ``>=``."""
    parts = split_top(text, frozenset(("=", "\\ne", *_RELATIONS)))
    if len(parts) != 2:
        return None
    (_, left), (sign, right) = parts
    return left, _RELATIONS.get(sign, sign), right


def as_matrix(text: str) -> tuple[str, list[list[str]]] | None:
    """``(kind, rows)`` of a matrix; the kind is ``|`` for a determinant and "" for all other brackets."""
    match = _MATRIX.fullmatch(text.strip())
    if match is None or not match[1].endswith(("matrix", "array")) or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    kind = "|" if match[1] == "vmatrix" or text.startswith("|") else ""
    return kind, [[cell.strip() for cell in row.split("&")] for row in rows]
