"""Numbers for people: short values, durations, sizes."""

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
