r"""Rewrites answers in a normal form: markup, spacing, spelled-out words and Unicode become plain LaTeX.

Each rule is one pass of a regular expression without nested repetition, so the time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rlinf_lite.rewards.unicode_math import to_latex

Replacement = str | Callable[["re.Match[str]"], str]

_MULTIPLIERS = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}"}
_MULTIPLIERS |= {"billion": "10^{9}", "trillion": "10^{12}"}
_REPEATED = re.compile(r"([0-9]{1,12}?)\1+$")


def _repeating(match: re.Match[str]) -> str:
    """A repeating decimal such as ``0.1\\overline{6}`` as a fraction; groups ``whole``, ``fixed``, ``period``."""
    whole, fixed, period = int(match["whole"] or 0), match["fixed"], match["period"]
    value = whole + (Fraction(int(fixed or 0)) + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _trailing_dots(match: re.Match[str]) -> str:
    """``0.333...`` as a fraction, if its last digits repeat; other decimals are not known exactly and stay."""
    repeated = _REPEATED.search(match["digits"])
    if repeated is None:
        return match[0]
    fixed, period = match["digits"][: repeated.start()], repeated[1]
    as_written = re.match(r"(?P<whole>\d*) (?P<fixed>\d*) (?P<period>\d+)", f"{match['whole']} {fixed} {period}")
    assert as_written is not None
    return _repeating(as_written)


_RULES: tuple[tuple[str, Replacement], ...] = (
    # Markup without meaning.
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|!)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;: ]|~|\\(?:q?quad|enspace|thinspace|hspace\{[^{}]*\})(?![A-Za-z])", " "),
    (r"(?<!\\)\\([%&#_])", r"\1"),
    (r"\{,\}", ","),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
    (r"\\(?:lbrace)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace)(?![A-Za-z])", r"\\}"),
    (r"\\(?:leq|leqslant|le)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geq|geqslant|ge)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\(?:neq|not\s*=)(?![A-Za-z])|!=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:lor|vee)(?![A-Za-z])", " or "),
    (r"\\(?:land|wedge)(?![A-Za-z])", " and "),
    (r"\\(?:dots[a-z]?|cdots|ldots)(?![A-Za-z])|\.\.\.", r"\\ldots "),
    (r"\\(?:varnothing|empty)(?![A-Za-z])|\\\{\s*\\\}|\bempty set\b", r"\\emptyset "),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:simeq|doteq)(?![A-Za-z])", r"\\approx "),
    (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\bdegrees?\b)", r"^\\circ "),
    # Fonts and text. Words get spaces around them, so that `5\text{m}` is a quantity and `5m` is a product.
    (r"\\math(?:rm|bf|it|sf|tt|normal)\s*\{([A-Za-z0-9])\}", r"\1"),
    (r"\{\\(?:rm|bf|it|sf)\s+([^{}]*)\}", r" \1 "),
    (
        r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|bm|boldsymbol|"
        r"underline)\s*\{([^{}]*)\}",
        r" \1 ",
    ),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|bm|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (r"\b([apAP])\.\s?[mM]\b\.?", r"\1m"),
    (r"(?<=[0-9}])\s*\(\s*[A-Za-z][A-Za-z .]*[A-Za-z]\s*\)\s*$", ""),  # 18 (eggs)
    # Mathematics in words.
    (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
    (r"(?<![A-Za-z\\])(?:square root of|sqrt)(?![A-Za-z])", r"\\sqrt"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
    (r"(?<![A-Za-z\\])(?:infinity|infty|inf|oo)(?![A-Za-z])|\\infin(?:ity)?(?![A-Za-z])", r"\\infty "),
    (
        r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|arcsin|arccos|arctan|exp|gcd|lcm|max|min)(?=[\s(_^{\d])",
        r"\\\1",
    ),
    (r"\s*\b(?:percent|per cent|percentage|pct)\b", "%"),
    (
        rf"(?i:(?<=[0-9])\s*({'|'.join(_MULTIPLIERS)})s?\b)",
        lambda match: rf" \cdot {_MULTIPLIERS[match[1].lower()]}",
    ),
    (r"\b(?:the set of )?all real(?: number)?s?(?: numbers)?\b|\\mathbb\s*\{?R\}?", r"(-\\infty ,\\infty )"),
    (r"\+\s*\\infty", r"\\infty"),
    (r"\bplus or minus\b|\+/-|\+-", r"\\pm "),
    # Powers, roots, products and fractions in plain text.
    (r"(?<=[\w)}])\*\*(?=[\w({\\-])", "^"),
    (r"\^\s*\(([^(){}]*)\)", r"^{\1}"),
    (r"\^\s*([-+]?[0-9]+(?:\.[0-9]+)?|-\s*[A-Za-z])", r"^{\1}"),
    (r"_\s*([0-9]+)", r"_{\1}"),
    (r"(?<=[0-9])\s+[xX]\s+(?=[0-9(\\])|(?<=[0-9])[xX](?=[0-9])", r" \\times "),
    (r"\*", r" \\cdot "),
    (r"(?<![\w.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]+)(?![\w.])", r"\1 \\times 10^{\2}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([0-9]+|[A-Za-z](?![A-Za-z])|\\[a-z]+)", r"\\sqrt{\1}"),
    (r"\\sqrt\s+(?=[{\[])", r"\\sqrt"),
    (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9A-Za-z])\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*\{([^{}]*)\}\s*([0-9A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9])'(?=[0-9]{3}(?![0-9]))", ""),
    # Numbers: 1 234 567, 0.1\overline{6}, 0.(6), 0.333..., 2 1/4.
    (r"(?<![\w.,}])([0-9]{1,3}(?: [0-9]{3})+)(?![\w.]*[\w/])", lambda match: match[1].replace(" ", "")),
    (r"(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)\\(?:overline|bar|dot)\s*\{?(?P<period>[0-9]{1,40})\}?", _repeating),
    (r"(?P<whole>[0-9]+)\.(?P<fixed>[0-9]*)\((?P<period>[0-9]{1,40})\)", _repeating),
    (r"(?P<whole>[0-9]+)\.(?P<digits>[0-9]{2,60})\s*\\ldots(?![A-Za-z])", _trailing_dots),
    (
        r"(?<![\w./}^])([0-9]+)(?:\s+|\s*-\s*(?=[0-9]+/[0-9]+\s+[a-z]{3}))([0-9]+)\s*/\s*([0-9]+)(?![\w./])",
        r"(\1+\\frac{\2}{\3})",
    ),
    (r"(?<![\w./}^])([0-9]+)\s*\\frac\{([0-9]+)\}\{([0-9]+)\}", r"(\1+\\frac{\2}{\3})"),
    (r"(?<![\w./])([0-9]+)\s*/\s*([0-9]+)(?![\w./])", r"\\frac{\1}{\2}"),
    (r"\s+", " "),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in _RULES)
_LABEL = re.compile(r"(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?\s*[:=]?\s+", re.IGNORECASE)
_PAIRS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"))
_DOLLAR = re.compile(r"(?<!\\)\$")


def normal_form(text: str) -> str:
    r"""``text`` in normal form. A dollar sign that remains is money.

    For instance, ``\dfrac12`` and ``½`` become ``\frac{1}{2}``; ``1\frac14`` and ``1 1/4`` become ``(1+\frac{1}{4})``;
    ``1.5e3`` becomes ``1.5 \times 10^{3}``; ``25\,\mathrm{cm}^2`` becomes ``25 cm ^{2}``.
    """
    text = _without_wrapping(to_latex(text))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = _without_wrapping(text.strip(" \t\n.,;:?"))
    return _LABEL.sub("", text, count=1) if _LABEL.match(text) else text


def _without_wrapping(text: str) -> str:
    """Remove math delimiters, quotes and bold marks around the whole text, and dollar signs that are not money."""
    before = None
    while text != before:
        before, text = text, text.strip()
        for opening, closing in _PAIRS:
            inner = text[len(opening) : -len(closing)]
            if len(text) > 2 * len(opening) and text == opening + inner + closing and opening not in inner:
                text = inner
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub("", text)
    return text.replace("\\$", "$").strip()
