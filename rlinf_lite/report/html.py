"""The few pieces of HTML that every section is made of. Text that comes from outside goes through `text` or `cell`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from rlinf_lite.observability.samples import printable

_FOLD_FROM = 320
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control signs, and those that turn the direction of the text around them."""


def text(value: object) -> str:
    """Escaped; what a page cannot hold (control signs, half surrogates) is replaced."""
    return escape(_HIDDEN.sub("\ufffd", printable(str(value).replace("\r\n", "\n"))))


def folded(value: str) -> str:
    """A long text as its beginning, which opens."""
    if len(value) <= _FOLD_FROM and value.count("\n") <= 8:
        return f'<div class="text">{text(value)}</div>'
    head = "\n".join(value[:_FOLD_FROM].split("\n")[:6])
    rest = f'<div class="text">{text(value[len(head) :])}</div>'
    return f'<details><summary class="text">{text(head)} …</summary>{rest}</details>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Sequence[int] = (),
    whole: Sequence[int] = (),
    name: str = "",
) -> str:
    """Cells are HTML already; columns in ``numbers`` stand to the right, those in ``whole`` are never broken."""

    def css(index: int) -> str:
        return ' class="number"' if index in numbers else ' class="whole"' if index in whole else ""

    top = "".join(f"<th{css(i)}>{label}</th>" for i, label in enumerate(head))
    body = "".join(f"<tr>{''.join(f'<td{css(i)}>{c}</td>' for i, c in enumerate(cells))}</tr>" for cells in rows)
    return f'<div class="card"><table class="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, *parts: str) -> str:
    """Nothing where there are no parts."""
    body = "".join(parts)
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def tile(name: str, value: str, note: str = "") -> str:
    return f'<div class="tile"><span class="name">{name}</span><b>{text(value)}</b><span>{text(note)}</span></div>'
