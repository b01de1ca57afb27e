"""`Row`: one row of a data file as it is stored, before its prompt and answer are looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a source."""

    path: str
    """The path as configured, for messages."""
    line: int
    """1-based: the line in a text file, or the row in a table."""
    fields: dict[str, Any]
    exact: Callable[[], dict[str, Any]] | None = None
    """Returns the fields with a `Decimal` in place of each float that may differ from the stored number.

    None if no float differs."""

    @property
    def where(self) -> str:
        """For error messages: ``"data/train.jsonl:17"``."""
        return f"{self.path}:{self.line}"

    @property
    def source(self) -> str:
        """For ``Problem.source``: ``"train.jsonl:17"``."""
        return f"{display_name(self.path)}:{self.line}"


def display_name(path: str) -> str:
    """The name of a configured path in messages and ``Problem.source``: without its directories."""
    return path if path.startswith("hf:") else PurePath(path).name
