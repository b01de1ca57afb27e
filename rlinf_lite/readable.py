"""Numbers as people read them: ``5.2k``, ``1.6 GB``, ``12.5 %``, ``4 min 10 s``. Prefixes are powers of 1000."""

from __future__ import annotations

import math

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """About three digits: ``0.953``, ``12``, ``1234``, ``12.3k``, ``3.0e-05``."""
    if not math.isfinite(value):
        return str(value)
    magnitude = abs(value)
    if magnitude >= 1e4:
        return count(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    return "0" if magnitude == 0 else f"{value:.3g}" if magnitude >= 1e-3 else f"{value:.1e}"


def count(value: float) -> str:
    """A whole number of things: ``12``, ``5.2k``, ``123k``, ``1.5M``."""
    digits, prefix = _scaled(value)
    return f"{digits}{prefix}"


def size(num_bytes: float) -> str:
    """``12 B``, ``1.5 MB``, ``135 MB``, ``1.6 GB``."""
    digits, prefix = _scaled(num_bytes)
    return f"{digits} {prefix}B"


def percent(fraction: float) -> str:
    """``12.5 %`` of 0.125."""
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else str(fraction)


def duration(seconds: float) -> str:
    """``0.034 s``, ``12.3 s``, ``4 min 10 s``, ``3 h 07 min``, ``2 d 4 h``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 0.001 or seconds == 0 else f"{1000 * seconds:.2g} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _scaled(value: float) -> tuple[str, str]:
    """Digits and prefix: one decimal below 100, none above."""
    for factor, prefix in _PREFIXES:
        # What would be rounded to 1000 of one prefix is 1 of the next.
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{1 if abs(scaled) < 99.95 else 0}f}", prefix
    return f"{value:.0f}", ""
