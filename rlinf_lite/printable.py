"""Making text from files safe to show: on a terminal, and where only valid UTF-8 is taken."""

from __future__ import annotations


def escape_controls(text: str) -> str:
    """Escape control characters, with which a name from a file could drive the terminal: ``\\n`` becomes ``\\\\n``."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def replace_surrogates(text: str) -> str:
    """Replace half surrogate pairs, which a careless JSON file may hold and UTF-8 cannot, by ``?``."""
    return text.encode("utf-8", "replace").decode()
