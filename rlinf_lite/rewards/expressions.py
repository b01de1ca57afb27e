r"""Decides with sympy whether two expressions are equal. It may hang, so only the verifier's child process runs it.

Decimals are exact fractions (``0.5`` is one half, ``3.14`` is not pi). If the expressions are not identical they are
evaluated: constants to 400 digits relative to their size, functions at fixed points to 60. There is no absolute
tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

_CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_CONSTANT_DIGITS, _FUNCTION_DIGITS = 400, 60
_NUM_POINTS, _MAX_TRIES = 6, 40
_I, _i = sympy.I, sympy.Symbol("i")

_PREPARE = (
    (re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\\circ"), r"(\\frac{\1 \\pi}{180})"),
    (re.compile(r"([A-Za-z])'"), r"\1_{prime}"),
    # latex2sympy reads a number next to a bracket or a fraction as a mixed number.
    (re.compile(r"(?<=[0-9])\s*(?=\(|\\frac|\\sqrt)"), r" \\cdot "),
    (re.compile(r"\\ln(?![A-Za-z])"), r"\\log_{e}"),
)
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*\.[0-9]+)")
_JUXTAPOSED_NUMBERS = re.compile(r"[0-9]\s+[0-9]")


class Unreadable(ValueError):
    """The text is not an expression."""


def same_expression(reference: str, found: str, up_to_factor: bool = False) -> bool:
    """Whether two expressions in normal form are equal.

    Text that is not an expression equals nothing.

    Args:
        up_to_factor: whether their quotient is a constant other than 0, instead.
    """
    try:
        a, b = _read(reference), _read(found)
    except Unreadable:
        return False
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return _same_matrix(a, b) and not up_to_factor
    if up_to_factor:
        return _same_zeros(a, b)
    if a == b:
        return True
    return _is_zero(sympy.Add(a, sympy.Mul(-1, b, evaluate=False), evaluate=False))


def _read(text: str) -> Any:
    for pattern, replacement in _PREPARE:
        text = pattern.sub(replacement, text)
    text = _DECIMAL.sub(_as_fraction, text)
    text = re.sub(r"(?<=[0-9])(?=\(\\frac)", r" \\cdot ", text)
    if _JUXTAPOSED_NUMBERS.search(text) or "\\ldots" in text:
        raise Unreadable(text)
    try:
        expression = latex2sympy(text, normalization_config=None, conversion_config=_CONFIG)
    except Exception as error:  # antlr and latex2sympy raise bare Exceptions for invalid LaTeX
        raise Unreadable(text) from error
    if isinstance(expression, sympy.MatrixBase):
        return expression
    if not isinstance(expression, sympy.Expr):
        raise Unreadable(text)
    return _plain(expression)


def _as_fraction(match: re.Match[str]) -> str:
    value = Fraction(match[1])
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _plain(expression: sympy.Expr) -> sympy.Expr:
    """Evaluate sums and the like; make ``i`` the imaginary unit, and calls of unknown functions symbols."""
    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Mod):
        expression = expression.doit()
    unknown = {call: sympy.Symbol(str(call)) for call in expression.atoms(sympy.core.function.AppliedUndef)}
    return expression.xreplace({**unknown, _i: _I})


def _is_zero(difference: sympy.Expr) -> bool:
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        return _constant_is_zero(difference)
    seen = 0
    for point in _points(symbols):
        value = _value(difference.xreplace(point), _FUNCTION_DIGITS)
        if value is None:
            continue
        if not value:
            return False
        seen += 1
        if seen == _NUM_POINTS:
            return True
    return bool(seen) or sympy.simplify(difference) == 0


def _constant_is_zero(number: sympy.Expr) -> bool:
    vanishes = _value(number, _CONSTANT_DIGITS)
    if vanishes:
        # Equal to 400 digits. Rational numbers are compared exactly: 10^{500} + 1 is not 10^{500}.
        exact = number.doit()
        return bool(exact == 0) if exact.is_Rational else True
    return bool(vanishes)


def _value(number: sympy.Expr, digits: int) -> bool | None:
    """Whether ``number`` is 0 to ``digits`` digits relative to its terms; None if it has no finite value."""
    value = number.evalf(2, maxn=digits)
    if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or value.free_symbols:
        return None
    parts = value.as_real_imag()
    if not all(part.is_Number for part in parts):
        return None
    return not any(part.is_comparable and part != 0 and part._prec > 1 for part in parts)


def _points(symbols: list[sympy.Symbol]) -> Iterator[dict[sympy.Symbol, sympy.Rational]]:
    """Fixed points of both signs; each coordinate has its own prime numerators and its own denominator."""
    for index in range(_MAX_TRIES):
        yield {
            symbol: sympy.Rational(
                (-1) ** (index // (1 + place % 3)) * sympy.prime(3 + 7 * index + 3 * place), 29 + 6 * place
            )
            for place, symbol in enumerate(symbols)
        }


def _same_zeros(a: sympy.Expr, b: sympy.Expr) -> bool:
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if a.free_symbols != b.free_symbols or not symbols:
        return False
    first = None
    for point in _points(symbols):
        values = [side.xreplace(point) for side in (a, b)]
        if all(_value(value, _FUNCTION_DIGITS) is False for value in values):
            first = values[0] / values[1]
            break
    return first is not None and _is_zero(sympy.Add(a, sympy.Mul(-1, first, b, evaluate=False), evaluate=False))


def _same_matrix(a: Any, b: Any) -> bool:
    if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)) or a.shape != b.shape:
        return False
    return all(_is_zero(_plain(x - y)) for x, y in zip(a, b, strict=True))
