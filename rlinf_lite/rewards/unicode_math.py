# ruff: noqa: RUF001
r"""Converts mathematical Unicode characters to LaTeX: ``½`` to ``\frac{1}{2}``, ``x²`` to ``x^{2}``, and so on."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₖᵢₓ", "0123456789+-()nkix", strict=True))
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_GREEK = dict(
    re.findall(
        r"(\S) (\w+)",
        "α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu "
        "ν nu ξ xi π pi ρ rho σ sigma τ tau φ phi ϕ phi χ chi ψ psi ω omega Γ Gamma Δ Delta Θ Theta "
        "Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega",
    )
)
_SYMBOLS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe58\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))), " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\u2061\u2062\u2063\ufeff\u200e\u200f\u00ad", ""),
    **dict.fromkeys("‘’ʹ′", "'"),
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("∙·⋅∗", r"\cdot "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("…⋯", r"\ldots "),
    **dict.fromkeys("⁄∕÷", "/"),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("°˚º", r"^\circ "),
    **{
        "×": r"\times ",
        "✕": r"\times ",
        "√": r"\sqrt ",
        "∛": r"\sqrt[3]",
        "∜": r"\sqrt[4]",
        "±": r"\pm ",
        "∓": r"\mp ",
    },
    **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "≠": r"\ne ", "∶": ":", "ℝ": r"\mathbb{R}"},
    **{
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
        "∧": " and ",
        "∨": " or ",
        "∠": r"\angle ",
        "∖": r"\setminus ",
        "⌊": r"\lfloor ",
    },
    **{
        "⌋": r"\rfloor ",
        "⌈": r"\lceil ",
        "⌉": r"\rceil ",
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "。": ".",
        "、": ",",
    },
    **{letter: rf"\{name} " for letter, name in _GREEK.items()},
    **{
        fraction: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", fraction).split("⁄"))
        for fraction in _FRACTIONS
    },
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D},
}
_SYMBOL_TABLE = str.maketrans(_SYMBOLS)
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_BARRED = re.compile("((?:[0-9][\u0305\u0304\u0307])+)")
_COMBINING = re.compile("[\u0305\u0304\u0307]")


def to_latex(text: str) -> str:
    """``text`` with mathematical Unicode characters as ASCII and LaTeX; other characters stay."""
    if text.isascii():
        return text
    text = _BARRED.sub(lambda match: rf"\overline{{{_COMBINING.sub('', match[1])}}}", text)
    text = _RAISED.sub(lambda match: f"^{{{''.join(_SUPERSCRIPTS[char] for char in match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{''.join(_SUBSCRIPTS[char] for char in match[0])}}}", text)
    return text.translate(_SYMBOL_TABLE)
