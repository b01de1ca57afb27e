"""What is wrong with a user's data. The message names the file, the line and the remedy."""

from __future__ import annotations

import json

from rlinf_lite.errors import UserError


class DataError(UserError, ValueError):
    """Data that cannot be trained on. One message string, so that it pickles across processes."""


def explain_json(error: ValueError | RecursionError, where: str, remedy: str) -> str:
    """What is wrong with JSON that could not be read."""
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}); {remedy}"
    if isinstance(error, RecursionError):
        return f"{where}: JSON nested too deeply; {remedy}"
    # An integer of thousands of digits.
    return f"{where}: a number that cannot be read ({str(error).partition(';')[0]}); write it as text"
