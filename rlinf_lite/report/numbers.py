"""Numbers for people: short values, durations, sizes, and the ticks of an axis."""

from __future__ import annotations

import math

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float, kind: str = "number") -> str:
    """About three digits; ``kind`` is ``number``, ``percent`` (of a fraction) or ``seconds``."""
    if not math.isfinite(value):
        return str(value)
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "seconds":
        return duration(value)
    size = abs(value)
    if size >= 1e4:
        factor, letter = next((factor, letter) for factor, letter in _SI if size >= factor * 0.9995)
        return f"{value / factor:.3g}{letter}"
    if size >= 100:
        return f"{value:.0f}"
    return "0" if size == 0 else f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """``0.034 s``, ``12.3 s``, ``4 min 10 s``, ``3 h 07 min``, ``2 d 4 h``."""
    if seconds < 100:
        return f"{seconds:.3g} s" if seconds >= 0.001 or seconds == 0 else f"{1000 * seconds:.2g} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(num_bytes: float) -> str:
    """``1.47 MB``, in powers of ten."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values within [low, high], about ``wanted`` of them."""
    if not high > low:
        return [low]
    step = _round_step((high - low) / wanted)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 between where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    signs = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [sign * 10.0**decade for decade in decades for sign in signs if low <= sign * 10.0**decade <= high]


def _round_step(least: float) -> float:
    power = 10 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def tick_label(value: float, spacing: float, kind: str = "number") -> str:
    """``value`` with the digits that tell it from its neighbours."""
    if kind == "percent":
        return f"{100 * value:.{_decimals(100 * spacing)}f} %"
    unit = " s" if kind == "seconds" else ""
    if value and (abs(value) >= 1e4 or max(abs(value), spacing) < 1e-3):
        return short(value) + unit
    return f"{value:.{_decimals(spacing)}f}{unit}"


def _decimals(spacing: float) -> int:
    """Digits after the point that a multiple of ``spacing`` needs."""
    for digits in range(6):
        if math.isclose(spacing * 10**digits, round(spacing * 10**digits), rel_tol=1e-6):
            return digits
    return 6
