"""Errors in a user's data. Each message names the file, the line and the remedy."""

from __future__ import annotations

import json

from rlinf_lite.errors import UserError


class DataError(UserError, ValueError):
    """The data cannot be trained on."""


def explain_json(error: ValueError | RecursionError, where: str, remedy: str) -> str:
    """The message for JSON that could not be read.

    Args:
        where: file and line.
        remedy: what the JSON should look like.
    """
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}); {remedy}"
    if isinstance(error, RecursionError):
        return f"{where}: JSON nested too deeply; {remedy}"
    # Python refuses to read integers of more than 4300 digits.
    return f"{where}: a number that cannot be read ({str(error).partition(';')[0]}); write it as text"
