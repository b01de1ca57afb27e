r"""Decides whether two final answers are equivalent.

Structure (lists, intervals, units, labels, words) is compared here, as text; expressions are compared by a callback, in
practice the verifier. Numbers are compared exactly. The rules are the table in ``docs/data-and-rewards.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rlinf_lite.rewards.normal_form import normal_form
from rlinf_lite.rewards.plain_numbers import parse_number, same_number
from rlinf_lite.rewards.structure import (
    Interval,
    Items,
    Region,
    as_interval,
    as_items,
    as_matrix,
    as_region,
    as_relation,
    enclosed,
    split_top,
)
from rlinf_lite.rewards.units import compound, same_unit, split_unit
from rlinf_lite.rewards.words import is_text, number_word, same_text

CompareExpressions = Callable[[str, str, bool], bool]
"""``(reference, found, up_to_factor)``: whether two expressions are equal or, with ``up_to_factor``, differ by a
constant factor."""

MAX_EXPRESSIONS, MAX_PAIRS, MAX_DEPTH = 100, 5000, 20
"""Limits per answer: expressions to compare, pairs of parts, depth of brackets. An answer beyond them is wrong."""

_CHOICE = re.compile(r"\(([A-Ja-j])\)(?:\s*(?![,;/+*^=-]|and\b|or\b)(.+))?|([A-J])(?:[).:]\s*(.+))?", re.DOTALL)
_LABEL = re.compile(
    r"(?:(?P<symbol>\\?[A-Za-z]+'*(?:_\{?\w+\}?)?|m?\s*\\angle\s*[A-Z]+|\|[A-Z]+\||\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\))"
    r"|(?P<function>[A-Za-z](?:\^\{-1\}|_\{?\w+\}?)?'*\([^()=]*\))|(?P<words>[A-Za-z][A-Za-z ]*?))\s*"
    r"(?:=|\\in(?![A-Za-z])|\\approx(?![A-Za-z]))\s*(?P<rest>[^=]+)",
    re.DOTALL,
)
_WORDS_COLON = re.compile(r"[A-Za-z][A-Za-z ]+:\s*(\S.*)", re.DOTALL)
_HEDGE = re.compile(
    r"(?:approximately|about|exactly|only|just|roughly|around|nearly|a total of)\s+|\\approx\s*|=\s*", re.I
)
_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(\d+|two|three|eight|ten|sixteen)\s*\}?")
_BASE_WORDS = {"two": 2, "three": 3, "eight": 8, "ten": 10, "sixteen": 16}
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_SCRIPT = re.compile(r"[\^_]\s*(?:\{[^{}]*\}|[0-9])|(?<=[A-Za-z])\([^()]*\)")
_SPACES = re.compile(r"(?<![0-9A-Za-z,]) +| +(?![0-9A-Za-z])")


def same_answer(reference: str, found: str, compare_expressions: CompareExpressions) -> bool:
    """Whether two final answers, as extracted from their texts, are equivalent.

    Args:
        compare_expressions: compares two expressions in normal form that are not plain numbers. Its exceptions
            propagate.
    """
    return _Comparison(compare_expressions).same(normal_form(reference), normal_form(found))


class _Comparison:
    """One comparison of two answers, and how much of the limits it has used."""

    def __init__(self, compare_expressions: CompareExpressions) -> None:
        self._compare_expressions, self._num_expressions = compare_expressions, 0
        self._num_pairs, self._depth = 0, 0

    def same(self, reference: str, found: str) -> bool:
        """Whether two answers, or parts of answers, in normal form are equivalent."""
        self._num_pairs += 1
        if self._num_pairs > MAX_PAIRS or self._depth >= MAX_DEPTH:
            return False
        self._depth += 1
        same = self._same(reference, found)
        self._depth -= 1
        return same

    def _same(self, reference: str, found: str) -> bool:
        reference, found = _unhedged(reference), _unhedged(found)
        if not reference or not found:
            return False
        if _SPACES.sub("", reference) == _SPACES.sub("", found):
            return True
        number, expected = parse_number(found), parse_number(reference)
        if number is not None and expected is not None:
            return same_number(number, expected)
        parts, parts_found = compound(reference), compound(found)
        if parts or parts_found:
            return parts == parts_found
        for rule in (self._choices, self._bases, self._regions, self._labels, self._texts, self._items, self._matrices):
            verdict = rule(reference, found)
            if verdict is not None:
                return verdict
        return self._quantities(reference, found)

    # Each rule returns a verdict, or None if it does not apply.

    def _choices(self, reference: str, found: str) -> bool | None:
        expected, chosen = _choice(reference), _choice(found)
        if expected and chosen:
            return expected[0] == chosen[0] and (not (expected[1] and chosen[1]) or self.same(expected[1], chosen[1]))
        if expected and expected[1]:
            return self.same(expected[1], found)
        if chosen and chosen[1]:
            return self.same(reference, chosen[1])
        return None

    def _bases(self, reference: str, found: str) -> bool | None:
        """``1011_2`` equals ``11_{10}`` and ``1011`` (without its base), but not ``1011_3``."""
        based, based_found = _BASE.fullmatch(reference), _BASE.fullmatch(found)
        if based and based_found:
            value, value_found = _value_in_base(based), _value_in_base(based_found)
            return value is not None and value == value_found
        one = based or based_found
        return one[1] == (found if based else reference) if one else None

    def _regions(self, reference: str, found: str) -> bool | None:
        expected, region_found = as_region(reference), as_region(found)
        if expected is None and region_found is None:
            return None
        expected, region_found = expected or _one_interval(reference), region_found or _one_interval(found)
        if expected is None or region_found is None:
            return False
        if expected.variable and region_found.variable and expected.variable != region_found.variable:
            return False
        return self._match(expected.pieces, region_found.pieces, self._same_piece)

    def _same_piece(self, reference: Interval | str, found: Interval | str) -> bool:
        if isinstance(reference, Interval) and isinstance(found, Interval):
            return (
                reference[2:] == found[2:]
                and self.same(reference.low, found.low)
                and self.same(reference.high, found.high)
            )
        return isinstance(reference, str) and isinstance(found, str) and self.same(reference, found)

    def _labels(self, reference: str, found: str) -> bool | None:
        expected, label = _LABEL.fullmatch(reference), _LABEL.fullmatch(found)
        if expected and label and _labels_agree(expected, label):
            return self.same(expected["rest"], label["rest"])
        if expected and not label and not as_relation(found) and not _all_relations(found):
            return self.same(expected["rest"], found)
        if label and not expected and not as_relation(reference) and not _all_relations(reference):
            return self.same(reference, label["rest"])
        colon = None if ":" in reference else _WORDS_COLON.fullmatch(found)
        if colon:
            return self.same(reference, colon[1])
        return self._relations(reference, found)

    def _relations(self, reference: str, found: str) -> bool | None:
        if _is_list(reference) or _is_list(found):
            return None
        chain = [part for _, part in split_top(found, frozenset(("=", "\\approx")))]
        expected, stated = as_relation(reference), as_relation(found)
        if expected is None and len(split_top(reference, frozenset("="))) == 1:
            if len(chain) > 1:
                return _is_calculation(chain) and any(self.same(reference, part) for part in _results(found))
            return False if stated else None
        if expected is None or stated is None:
            return False
        (left, sign, right), (left_found, sign_found, right_found) = expected, stated
        if sign in ("=", "\\ne"):
            return sign == sign_found and self._expressions(
                _difference(left, right), _difference(left_found, right_found), up_to_factor=True
            )
        if sign[1:] != sign_found[1:] or sign_found not in ("<", ">", "<=", ">="):
            return False
        if sign != sign_found:
            left_found, right_found = right_found, left_found
        return self._expressions(_difference(left, right), _difference(left_found, right_found))

    def _texts(self, reference: str, found: str) -> bool | None:
        if _is_list(reference) or _is_list(found):
            return None
        expected, word = number_word(reference), number_word(found)
        if expected is not None or word is not None:
            return self.same(expected or reference, word or found)
        quantity, quantity_found = split_unit(reference), split_unit(found)
        if not is_text(quantity.number) and not is_text(quantity_found.number):
            return None
        return same_text(reference, found)

    def _items(self, reference: str, found: str) -> bool | None:
        expected, listed = as_items(reference), as_items(found)
        if expected is None and listed is None:
            return None
        column = as_matrix(reference) or as_matrix(found)
        if column:
            return self._columns(reference, found)
        if expected is None or listed is None:
            one, other = (expected, found) if expected else (listed, reference)
            assert one is not None
            return len(one.parts) == 1 and (
                self.same(one.parts[0], found) if expected else self.same(other, one.parts[0])
            )
        expected, listed = _unlabelled(expected, listed)
        if len(expected.parts) != len(listed.parts):
            return False
        if any("\\ldots" in part for part in (*expected.parts, *listed.parts)):
            return self._same_in_order(expected, listed)
        kinds = {_kind(expected), _kind(listed)}
        if kinds <= {"list", "set"}:
            return self._match(expected.parts, listed.parts, self.same)
        if "set" in kinds or (kinds == {"list", "["} and len(listed.parts) == 2):
            return False
        has_ends = len(expected.parts) == 2 and "list" not in kinds
        if has_ends and (expected.opening, expected.closing) != (listed.opening, listed.closing):
            return False
        return self._same_in_order(expected, listed)

    def _same_in_order(self, expected: Items, listed: Items) -> bool:
        return all(self.same(part, found) for part, found in zip(expected.parts, listed.parts, strict=True))

    def _matrices(self, reference: str, found: str) -> bool | None:
        expected, given = as_matrix(reference), as_matrix(found)
        if expected is None or given is None:
            return None
        (kind, rows), (kind_found, rows_found) = expected, given
        if kind != kind_found or [len(row) for row in rows] != [len(row) for row in rows_found]:
            return False
        cells = zip((c for row in rows for c in row), (c for row in rows_found for c in row), strict=True)
        return all(self.same(cell, cell_found) for cell, cell_found in cells)

    def _columns(self, reference: str, found: str) -> bool:
        """Compare a column vector with a tuple in round brackets."""
        column = as_matrix(reference)
        matrix, listed = (column, as_items(found)) if column else (as_matrix(found), as_items(reference))
        assert matrix is not None
        if listed is None or listed.opening != "(" or any(len(row) != 1 for row in matrix[1]):
            return False
        cells, parts = [row[0] for row in matrix[1]], list(listed.parts)
        pairs = (cells, parts) if column else (parts, cells)
        return len(cells) == len(parts) and all(map(self.same, *pairs))

    def _quantities(self, reference: str, found: str) -> bool:
        for opening in "([":
            outer, outer_found = enclosed(reference), enclosed(found)
            if outer and outer[0] == opening:
                return self.same(outer[1], found)
            if outer_found and outer_found[0] == opening:
                return self.same(reference, outer_found[1])
        if ":" in reference or ":" in found:
            return self._ratios(reference, found)
        if reference.endswith("%") or found.endswith("%"):
            return self._percentages(reference, found)
        quantity, quantity_found = split_unit(reference), split_unit(found)
        if quantity.unit or quantity_found.unit:
            return same_unit(quantity.unit, quantity_found.unit) and self.same(quantity.number, quantity_found.number)
        return self._expressions(reference, found)

    def _ratios(self, reference: str, found: str) -> bool:
        parts, parts_found = reference.split(":"), found.split(":")
        if len(parts) != len(parts_found):
            number, number_found = split_unit(reference).number, split_unit(found).number
            has_units = (number, number_found) != (reference, found)
            return has_units and self.same(number, number_found)
        return all(
            self.same(part.strip(), part_found.strip()) for part, part_found in zip(parts, parts_found, strict=True)
        )

    def _percentages(self, reference: str, found: str) -> bool:
        number, number_found = reference.rstrip("% "), found.rstrip("% ")
        if self.same(number, number_found):
            return True
        if reference.endswith("%") and found.endswith("%"):
            return False
        hundredth, other = (number, found) if reference.endswith("%") else (number_found, reference)
        return self._expressions(rf"\frac{{{hundredth}}}{{100}}", split_unit(other).number)

    def _match(self, expected: tuple, listed: tuple, same: Callable[..., bool]) -> bool:
        """Whether the parts are equivalent in some order. Equivalence is transitive, so any partner is as good."""
        left = list(listed)
        for part in expected:
            partner = next((index for index, found in enumerate(left) if same(part, found)), None)
            if partner is None:
                return False
            del left[partner]
        return not left

    def _expressions(self, reference: str, found: str, up_to_factor: bool = False) -> bool:
        self._num_expressions += 1
        if self._num_expressions > MAX_EXPRESSIONS or is_text(reference) or is_text(found):
            return False
        return self._compare_expressions(reference, found, up_to_factor)


def _unhedged(text: str) -> str:
    return _HEDGE.sub("", text, count=1) if _HEDGE.match(text) else text


def _choice(text: str) -> tuple[str, str] | None:
    """``(letter, text)`` of ``B``, ``(B)``, ``B.``, ``(B) 18``."""
    match = _CHOICE.fullmatch(text)
    return ((match[1] or match[3]).upper(), match[2] or match[4] or "") if match else None


def _one_interval(text: str) -> Region | None:
    interval = as_interval(text)
    return Region("", (interval,)) if interval else None


def _labels_agree(expected: re.Match[str], label: re.Match[str]) -> bool:
    """Two different symbols do not agree; functions and words agree with any symbol."""
    if expected["symbol"] and label["symbol"]:
        return bool(expected["symbol"].replace(" ", "") == label["symbol"].replace(" ", ""))
    if expected["function"] and label["function"]:
        return bool(expected["function"].replace(" ", "") == label["function"].replace(" ", ""))
    return True


def _difference(left: str, right: str) -> str:
    return left if right.strip() == "0" else f"({left})-({right})"


def _is_calculation(chain: list[str]) -> bool:
    r"""Whether a chain states its last value: ``9 \times 2 = 18`` and ``m + n = 18`` do, ``x + 1 = 18`` does not."""
    return all(not _VARIABLE.search(part) for part in chain[1:-1]) and (
        not _VARIABLE.search(_COMMAND.sub("", chain[0])) or not re.search("[0-9]", _SCRIPT.sub("", chain[0]))
    )


def _results(found: str) -> list[str]:
    """The last side of a chain of equations; both last sides if there is a ``\\approx`` between them."""
    parts = split_top(found, frozenset(("=", "\\approx")))
    return [parts[-1][1]] + ([parts[-2][1]] if parts[-1][0] == "\\approx" else [])


def _is_list(text: str) -> bool:
    return as_items(text) is not None


def _all_relations(text: str) -> bool:
    listed = as_items(text)
    return listed is not None and listed.opening == "" and all(as_relation(part) for part in listed.parts)


def _kind(listed: Items) -> str:
    return {"": "list", "\\{": "set"}.get(listed.opening, listed.opening)


def _unlabelled(expected: Items, listed: Items) -> tuple[Items, Items]:
    """Remove the names of all items if only one side has them: ``x = 1 or x = 2`` against ``1, 2``."""
    labels = [[_LABEL.fullmatch(part) for part in side.parts] for side in (expected, listed)]
    has_all = [all(side) for side in labels]
    if has_all[0] == has_all[1]:
        return expected, listed
    named, index = (expected, 0) if has_all[0] else (listed, 1)
    matches = [match for match in labels[index] if match is not None]
    rests = tuple(match["rest"] for match in matches)
    # Different names are coordinates, so their order counts.
    opening = "(" if len({match["symbol"] for match in matches}) > 1 and named.opening == "" else named.opening
    changed = Items(opening, rests, ")" if opening == "(" else named.closing)
    return (changed, listed) if index == 0 else (expected, changed)


def _value_in_base(match: re.Match[str]) -> int | None:
    base = _BASE_WORDS.get(match[2]) or int(match[2])
    try:
        return int(match[1], base)
    except ValueError:  # there is no such base, or no such digit in it
        return None
